"""`headrace timeline` draws what `chrome_trace` writes, and says what is wrong with other files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli.main import app
from headrace.cli.timeline import read_trace
from headrace.errors import ConfigError
from headrace.telemetry import Span, chrome_trace

SPANS = [
    Span("read", "holder 0", 100.0, 4.0, 8_000_000_000),
    Span("commit", "receiver a[0]", 106.0, 2.0, 4_000_000_000),
    Span("stage", "receiver a[0]", 104.0, 2.0),
    Span("commit", "receiver a[0]", 109.0, 1.0),
    Span("vote", "receiver a[0]", 105.0, 1e-6),
]


def _lines(tmp_path: Path, trace: object, *options: str) -> list[str]:
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(trace))
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["timeline", str(file), *options])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_bars_lie_where_the_spans_are(tmp_path: Path) -> None:
    header, read, stage, vote, commit, footer = _lines(tmp_path, chrome_trace(SPANS), "--width", "20")
    start = header.index("0 to 10 s")
    bars = [line[start : start + 20] for line in (read, stage, vote, commit)]
    assert bars == [
        "█" * 8 + " " * 12,
        " " * 8 + "█" * 4 + " " * 8,
        " " * 10 + "▏" + " " * 9,
        " " * 12 + "████  ██",
    ]
    assert footer == "one column is 500 ms"
    assert read.split()[-3:] == ["7.45", "GiB", "2.00"]
    assert read.startswith("holder 0")
    assert stage.startswith("receiver a[0]")
    assert commit.startswith(" ")


def test_a_bare_list_of_events_without_names_is_a_trace_too(tmp_path: Path) -> None:
    events = [{"ph": "X", "name": "step", "pid": 7, "tid": 1, "ts": 5, "dur": 2}, {"ph": "i", "name": "mark"}]
    lines = _lines(tmp_path, events)
    assert lines[1].startswith("7/1")


def test_a_trace_of_one_instant_is_drawn(tmp_path: Path) -> None:
    assert "▏" in _lines(tmp_path, chrome_trace([Span("x", "y", 1.0, 0.0)]), "--width", "20")[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not JSON"),
        ("\xff", "is not JSON"),
        ("17", "is not a Chrome trace"),
        ('{"traceEvents": 3}', "is not a Chrome trace"),
        ("{}", "no complete events"),
        ('[{"ph": "X", "name": "a", "dur": 1}]', "event 'a' has no number 'ts'"),
        ('[{"ph": "X", "name": "a", "ts": "now", "dur": 1}]', "event 'a' has no number 'ts'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "trace.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(file)
    assert caught.value.name == str(file)
