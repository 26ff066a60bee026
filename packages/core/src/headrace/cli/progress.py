"""Progress of an update on a terminal: a bar while bytes are read, a line per phase; nothing elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from headrace.cli.console import stderr

_PHASES = {
    "ready": "waiting for the engine to answer",
    "enrol": "waiting for the engine's workers to dial in",
    "read": "reading the source into host memory",
    "describe": "asking workers what they need",
    "plan": "planning",
    "stage": "staging while the engine serves",
    "commit": "committing in the pause",
}


class UpdateProgress:
    """A progress callback for `ParameterServer.update`; use as a context."""

    def __init__(self, title: str = "") -> None:
        console = stderr()
        self._title = f"{title} " if title else ""
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """Show one step of an update."""
        text = f"{self._title}{_PHASES.get(phase, phase)}"
        self._progress.update(
            self._task,
            description=text,
            completed=done_bytes,
            total=total_bytes or None,
            refresh=not total_bytes,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
