"""The command as a whole: help without heavy imports, errors as one line, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli.console import format_bytes, format_seconds, show_error
from headrace.cli.main import COMMANDS, app
from headrace.errors import (
    ApplyError,
    HeadraceError,
    ManifestMismatchError,
    RemoteFailure,
    TransferTimeoutError,
    UpdateFailedError,
)

HEADRACE = [sys.executable, "-m", "headrace"]


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HEADRACE, *args], capture_output=True, text=True, timeout=60, check=False)


def test_help_names_every_command() -> None:
    result = _run("--help")
    assert result.returncode == 0, result.stderr
    for command in COMMANDS:
        assert command.__name__.rpartition(".")[2] in result.stdout


def test_help_imports_no_engine_and_no_torch() -> None:
    script = (
        "import sys\nfrom headrace.cli.main import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'zmq', 'httpx', 'transformers', 'starlette'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_no_arguments_show_help() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "Usage" in result.output


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("headrace")


def test_an_error_is_one_line_on_stderr(tmp_path: Path) -> None:
    result = _run("timeline", str(tmp_path / "absent.json"))
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: trace ")
    assert "absent.json" in line
    assert line.endswith("[ConfigError]")


@pytest.mark.parametrize("seconds", ["nan", "-1"])
def test_a_deadline_that_is_none_is_refused(seconds: str) -> None:
    result = CliRunner().invoke(app, ["resume", "--to", "torch=http://127.0.0.1:1", "--deadline-s", seconds])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: --deadline-s is {float(seconds)}; give seconds")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = _run("--debug", "timeline", str(tmp_path / "absent.json"))
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "FileNotFoundError" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: trace ")


def test_interrupt_leaves_with_130(tmp_path: Path) -> None:
    fifo = tmp_path / "endless.json"
    os.mkfifo(fifo)
    command = [*HEADRACE, "timeline", str(fifo)]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        fifo.open("wb"),  # returns when the command has opened the other end
    ):
        end = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < end:
            process.send_signal(signal.SIGINT)  # one that comes just before a system call does not interrupt it
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)  # and one that comes while it leaves would end it there
        _, stderr = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def _shown(error: HeadraceError, capsys: pytest.CaptureFixture[str]) -> list[str]:
    show_error(error, debug=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_errors_tell_phase_rank_name_and_state(capsys: pytest.CaptureFixture[str]) -> None:
    error = TransferTimeoutError(
        "no bytes for 10 s [bold]", phase="stage", rank=3, name="lm_head.weight", weights_state="mixed"
    )
    assert _shown(error, capsys) == [
        "error: no bytes for 10 s [bold] "
        "[TransferTimeoutError, phase stage, rank 3, at lm_head.weight, weights_state mixed]"
    ]


def test_a_name_in_the_message_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert _shown(ApplyError("q.weight has shape [3]", name="q.weight"), capsys) == [
        "error: q.weight has shape [3] [ApplyError]"
    ]


def test_differences_are_listed_up_to_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _shown(ManifestMismatchError("25 differences", [f"w{i}: missing" for i in range(25)]), capsys)
    assert len(lines) == 22
    assert lines[1] == "  w0: missing"
    assert lines[-1] == "  ... and 5 more"


def test_failures_of_every_rank_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    failures = {
        ("a", 0): RemoteFailure("ApplyError", "shape", phase="commit", weights_state="mixed"),
        ("a", 1): RemoteFailure("KeyError", "'x'"),
    }
    error = UpdateFailedError("2 ranks failed", failures, phase="commit", weights_state="mixed")
    lines = _shown(error, capsys)
    assert lines[1:] == [
        "  a[0]: ApplyError in commit: shape (weights_state mixed)",
        "  a[1]: KeyError: 'x' (weights_state old)",
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 10, "1 KiB"), (5 << 28, "1.25 GiB"), (3 << 40, "3 TiB")],
)
def test_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (0.0056, "5.6 ms"), (12.34, "12.3 s"), (2.5e-7, "0.25 us"), (4321.0, "4321 s")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
