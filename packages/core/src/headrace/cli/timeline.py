"""`headrace timeline`: draws a Chrome trace as text, a bar per kind of span and track."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.console import format_bytes, format_seconds, stdout
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

FULL, PART = "█", "▏"
MIN_WIDTH = 20
OTHER_COLUMNS = 62


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """One complete event of a trace: seconds from the trace's first event."""

    track: str
    name: str
    begin_s: float
    duration_s: float
    num_bytes: int


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(timeline)


def timeline(
    file: Annotated[Path, typer.Argument(help="A trace written with --trace.", show_default=False)],
    width: Annotated[int, typer.Option(help="Columns of the bars; 0 takes the terminal's.", min=0)] = 0,
) -> None:
    """Draw a trace in the terminal: which stage ran when, on which process."""
    spans = read_trace(file)
    console = stdout()
    columns = width or max(MIN_WIDTH, console.width - OTHER_COLUMNS)
    console.print(timeline_table(spans, columns))
    console.print(f"one column is {format_seconds(_length_s(spans) / columns)}")


def read_trace(path: Path) -> list[TraceSpan]:
    """Read the complete events of a Chrome trace file, in the order of their begin.

    Raises:
        ConfigError: The file cannot be read, is not a trace, or has no complete event.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"trace {path} cannot be read: {error.strerror}", name=str(path)) from error
    except ValueError as error:
        raise ConfigError(f"trace {path} is not JSON: {error}", name=str(path)) from error
    events = data.get("traceEvents") if isinstance(data, dict) else data
    try:
        spans = _spans([event for event in events or () if isinstance(event, dict)])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trace {path} is not a Chrome trace: {error}", name=str(path)) from error
    if not spans:
        message = f"trace {path} has no complete events; write one with `headrace update --trace FILE.json`"
        raise ConfigError(message, name=str(path))
    return spans


def _spans(events: Sequence[dict[str, object]]) -> list[TraceSpan]:
    tracks = {
        (event.get("pid"), event.get("tid")): str(_args(event).get("name"))
        for event in events
        if event.get("ph") == "M" and event.get("name") == "thread_name"
    }
    complete = [event for event in events if event.get("ph") == "X"]
    origin = min((_number(event, "ts") for event in complete), default=0.0)
    spans = [
        TraceSpan(
            track=tracks.get((event.get("pid"), event.get("tid")), f"{event.get('pid')}/{event.get('tid')}"),
            name=str(event.get("name", "?")),
            begin_s=(_number(event, "ts") - origin) / 1e6,
            duration_s=_number(event, "dur") / 1e6,
            num_bytes=int(_number(_args(event), "bytes", 0)),
        )
        for event in complete
    ]
    return sorted(spans, key=lambda span: span.begin_s)


def _args(event: dict[str, object]) -> dict[str, object]:
    args = event.get("args")
    return args if isinstance(args, dict) else {}


def _number(event: dict[str, object], key: str, default: float | None = None) -> float:
    value = event.get(key, default)
    if not isinstance(value, int | float):
        raise TypeError(f"event {event.get('name')!r} has no number {key!r}")
    return float(value)


def timeline_table(spans: Sequence[TraceSpan], width: int) -> Table:
    """Return a table with one row per track and span name, bars `width` columns wide."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("track", "span"):
        table.add_column(heading, no_wrap=True)
    table.add_column(f"0 to {format_seconds(_length_s(spans))}", no_wrap=True, width=width)
    for heading in ("busy", "bytes", "GB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    scale = width / (_length_s(spans) or 1.0)
    shown = ""
    for (track, name), rows in _grouped(spans).items():
        busy_s, num_bytes = sum(span.duration_s for span in rows), sum(span.num_bytes for span in rows)
        table.add_row(
            "" if track == shown else track,
            name,
            _bar(rows, scale, width),
            format_seconds(busy_s),
            format_bytes(num_bytes) if num_bytes else "",
            f"{num_bytes / busy_s / 1e9:.2f}" if num_bytes and busy_s else "",
        )
        shown = track
    return table


def _length_s(spans: Sequence[TraceSpan]) -> float:
    return max(span.begin_s + span.duration_s for span in spans)


def _grouped(spans: Sequence[TraceSpan]) -> dict[tuple[str, str], list[TraceSpan]]:
    """Group by track, tracks in the order of their first span, and by name within a track."""
    order = list(dict.fromkeys(span.track for span in spans))
    groups: dict[tuple[str, str], list[TraceSpan]] = {}
    for span in sorted(spans, key=lambda span: order.index(span.track)):
        groups.setdefault((span.track, span.name), []).append(span)
    return groups


def _bar(spans: Sequence[TraceSpan], scale: float, width: int) -> str:
    """Draw spans on one line: every column that a span fills is full; shorter ones still leave a mark."""
    cells = [" "] * width
    for span in spans:
        first = min(int(span.begin_s * scale), width - 1)
        last = min(int((span.begin_s + span.duration_s) * scale), width)
        if last <= first and cells[first] == " ":
            cells[first] = PART
        cells[first:last] = FULL * (last - first)
    return "".join(cells).rstrip()
