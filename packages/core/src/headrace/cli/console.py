"""What every sub-command prints with: two consoles, JSON, units, and the form of an error."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping

import typer
from rich.console import Console

from headrace.errors import HeadraceError, ManifestMismatchError, RemoteFailure, UpdateFailedError

MAX_DIFFERENCES = 20
PLAIN_WIDTH = 120


def stdout() -> Console:
    """Return a console on the present stdout, at the terminal's width, or wide where it is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def stderr() -> Console:
    """Return a console on the present stderr: progress, warnings and errors belong there."""
    return Console(stderr=True, highlight=False)


def print_json(data: Mapping[str, object]) -> None:
    """Write `data` to stdout as indented JSON and nothing else, whatever the terminal is."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def format_bytes(num_bytes: float) -> str:
    """Return bytes in binary units, three digits: `1.25 GiB`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB" if value < 1000 else f"{value:,.0f} TiB"


def format_seconds(seconds: float) -> str:
    """Return seconds with a unit that keeps three digits: `5.6 ms`."""
    if seconds == 0:
        return "0 s"
    factor, unit = next(
        (pair for pair in ((1.0, "s"), (1e3, "ms")) if abs(seconds) * pair[0] >= 1), (1e6, "us")
    )
    value = seconds * factor
    return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"


def show_warning(text: str) -> None:
    """Write one line to stderr about what went wrong beside the work itself."""
    stderr().print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def show_error(error: HeadraceError, *, debug: bool) -> None:
    """Write an error to stderr: one red line, then what it lists; with `debug` the traceback before it."""
    console = stderr()
    if debug:
        console.print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True)
    line = f"error: {error}{_context(error)}"
    console.print(line, style="bold red", markup=False, soft_wrap=True)
    for detail in _details(error):
        console.print(f"  {detail}", style="red", markup=False, soft_wrap=True)


def _context(error: HeadraceError) -> str:
    parts = [type(error).__name__]
    if error.phase:
        parts.append(f"phase {error.phase}")
    if error.rank is not None:
        parts.append(f"rank {error.rank}")
    if error.name and error.name not in str(error):
        parts.append(f"at {error.name}")
    if error.phase or error.update_id or error.weights_state != "old":
        parts.append(f"weights_state {error.weights_state}")
    return f" [{', '.join(parts)}]"


def _details(error: HeadraceError) -> list[str]:
    if isinstance(error, ManifestMismatchError):
        left_out = len(error.differences) - MAX_DIFFERENCES
        rest = [f"... and {left_out} more"] if left_out > 0 else []
        return [*error.differences[:MAX_DIFFERENCES], *rest]
    if isinstance(error, UpdateFailedError):
        return [_failure(*key, failure) for key, failure in error.failures.items()]
    return []


def _failure(instance: str, rank: int, failure: RemoteFailure) -> str:
    where = f" in {failure.phase}" if failure.phase else ""
    state = f"weights_state {failure.weights_state}"
    return f"{instance}[{rank}]: {failure.type_name}{where}: {failure.message} ({state})"
