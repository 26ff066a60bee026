"""Files that options ask for: refused before the work where they cannot be written, and never the end of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="the embedded engine needs the extra headrace[engine]")

from headrace.cli.files import check_writable, write_json
from headrace.cli.main import app
from headrace.errors import ConfigError
from headrace.server.invitation import Invitation
from headrace.testing.engine_process import EngineProcess
from headrace.testing.tiny_model import make_tiny_qwen3

TO = ["--to", "torch=http://127.0.0.1:1", "--ready-s", "0.1"]
KEEPER = Invitation("tcp://127.0.0.1:1", "k" * 40, "secret")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["update", "--checkpoint", "CHECKPOINT", *TO], "--report"),
        (["update", "--checkpoint", "CHECKPOINT", *TO], "--trace"),
        (["join", *TO, "--from", "127.0.0.1:1", "--token", KEEPER.secret], "--report"),
        (["demo"], "--trace"),
        (["hold", "--checkpoint", "CHECKPOINT"], "--save-metas"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(command: list[str], option: str, tmp_path: Path) -> None:
    words = [str(tmp_path) if word == "CHECKPOINT" else word for word in command]
    result = CliRunner().invoke(app, [*words, option, str(tmp_path / "none" / "file.json")])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {option} "), result.output
    assert "there is no folder" in result.stderr


def test_what_can_be_written(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("kept")
    for path in (None, there, tmp_path / "new", Path("/dev/null")):
        check_writable(path, "--report")
    assert there.read_text() == "kept"
    assert not (tmp_path / "new").exists()
    for wrong in (tmp_path, there / "below", tmp_path / "none" / "file"):
        with pytest.raises(ConfigError, match="--report .* cannot be written"):
            check_writable(wrong, "--report")


def test_a_file_that_fails_late_is_one_line_of_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "none" / "file", {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "No such file" in line


def test_an_update_is_told_though_its_report_is_lost(tmp_path: Path) -> None:
    model = make_tiny_qwen3(tmp_path / "model", 0)
    with EngineProcess(model, log=tmp_path / "log") as engine:
        words = ["update", "--checkpoint", str(model), "--to", engine.target, "--json"]
        result = CliRunner().invoke(app, [*words, "--report", "/dev/full", "--trace", str(tmp_path / "trace")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["version"] == 1
    assert "warning: /dev/full was not written: " in result.stderr
    assert json.loads((tmp_path / "trace").read_text())["traceEvents"]
