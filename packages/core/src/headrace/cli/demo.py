"""`headrace demo`: a small model generates text while its weights change under it; ends with a table and proofs.

With `--json` stdout holds one document with these keys, and nothing else:

- `ok`: whether every proof held; `seconds`: length of the demo; `settings`: what was asked for;
- `model_bytes`: size of one version; `usual_gap_s`: median seconds between two tokens outside of updates;
- `ceiling`: `num_processes`, `bytes_each`, `rounds_s`, `gb_per_s` of plain copies (null where none was measured);
- `updates`: per update the keys of `headrace update --json`, and `source`, `asked_route`, `longest_gap_s` (longest time
  between two tokens of one request), `losses` (of the optimizer steps before it), `differences` (shards that are
  not bit-equal);
- `requests`: `num`, `tokens`, `across_updates`;
- `proofs`: by name `ok`, `claim`, `problems`, `details`: `bit_equal`, `requests_complete`, `versions_in_order`,
  `tokens_replayed`;
- `excerpt`: `versions`, `before`, `after`: text of one request on both sides of an update (null where there is none).
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer

from headrace.cli.console import print_json, stderr
from headrace.cli.files import check_writable, write_json

if TYPE_CHECKING:
    from rich.progress import TaskID


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    tp: Annotated[int, typer.Option(min=1, help="Worker processes of the engine.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Source of weights and prompts.")] = 0,
    updates: Annotated[
        int, typer.Option(min=1, help="First half from checkpoints, the rest from a trainer.")
    ] = 6,
    requests: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 4,
    keep: Annotated[
        Path | None, typer.Option(help="Folder that keeps checkpoints and the engine's log.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write Chrome trace events (Perfetto).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Show live updates of a small model that generates text without a break, and prove that they are right."""
    from headrace.cli.demo_tables import outcome_json, print_outcome
    from headrace.demo.story import DemoSettings, run_demo
    from headrace.telemetry import chrome_trace

    settings = DemoSettings(tp=tp, device=device, seed=seed, num_updates=updates, num_requests=requests)
    check_writable(trace, "--trace")
    with _ends_on_sigterm(), _folder(keep) as folder, DemoProgress(updates) as progress:
        outcome = run_demo(settings, folder, progress)
    if as_json:
        print_json(outcome_json(outcome, settings))
    else:
        print_outcome(outcome)
    write_json(trace, chrome_trace(outcome.spans))
    if not outcome.ok:
        raise typer.Exit(1)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="headrace-demo-") as name:
        yield Path(name)


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C is taken, so that the engine is ended too."""

    def end(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's contract
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class DemoProgress:
    """Two lines on stderr: what is done now, and how many updates and tokens were made; nothing without a terminal."""

    def __init__(self, num_updates: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        console = stderr()
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._updates: TaskID = self._progress.add_task("updates", total=num_updates)
        self._what = ""
        self._tokens = 0

    def say(self, text: str) -> None:
        """Show what is done now."""
        self._what = text
        self._show(text)

    def counted(self, updates: int, tokens: int) -> None:
        """Show how much was done."""
        self._tokens = tokens
        self._progress.update(self._updates, completed=updates)
        self._show(self._what)

    def moved(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """Show a phase of an update."""
        share = f" {done_bytes / total_bytes:.0%}" if total_bytes else ""
        self._show(f"{self._what}: {phase}{share}")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _show(self, text: str) -> None:
        tokens = f"{self._tokens:,} tokens" if self._tokens else ""
        self._progress.update(self._updates, description="  ".join(filter(None, (tokens, text))))
