"""What the benchmarks share: medians with their spread, tables for terminal and page, the machine, progress."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from headrace.report import UpdateReport
from headrace.telemetry import Span

WARM_UPS = 2
REPEATS = 5
PATIENCE_S = 60.0
_QUIET_LOAD = 0.7
_seen: list[float] = []


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of some repeats."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up repeats."""
        return cls(median(values), min(values), max(values))

    def ms(self) -> str:
        """Return `median (least-greatest)` of seconds, in milliseconds."""
        return f"{self.median * 1e3:.1f} ({self.least * 1e3:.1f}-{self.greatest * 1e3:.1f})"


@dataclass(frozen=True)
class Section:
    """One table of the page: `name` is its marker, `notes` are sentences below it."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def show(self, console: Console) -> None:
        """Print it."""
        table = Table(
            title=self.title, title_justify="left", caption="\n".join(self.notes), caption_justify="left"
        )
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        """Return it as a table of a Markdown page."""
        rule = ("---", *("---:" for _ in self.columns[1:]))
        lines = [
            f"**{self.title}**",
            "",
            *("| " + " | ".join(row) + " |" for row in (self.columns, rule, *self.rows)),
        ]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def print_sections(about: str | None, sections: Callable[[int], Iterable[Section]], repeats: int) -> None:
    """Be a benchmark's command: take `--repeats` and print its tables."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--repeats", type=int, default=repeats)
    for section in sections(parser.parse_args().repeats):
        section.show(Console(width=160))


def commit_seconds(report: UpdateReport) -> float:
    """Return the slowest worker's time from taking `Commit` to having its answer ready, checks included."""
    return max(
        _commit_of(spans)
        for spans in by_track(report.spans).values()
        if any(s.name == "commit" for s in spans)
    )


def _commit_of(spans: Sequence[Span]) -> float:
    begin = min(span.begin_s for span in spans if span.name == "commit")
    return max(span.begin_s + span.duration_s for span in spans if span.name in ("commit", "verify")) - begin


def by_track(spans: Sequence[Span], prefix: str = "receiver") -> dict[str, list[Span]]:
    """Return the spans of each track whose name begins with `prefix`."""
    tracks: dict[str, list[Span]] = {}
    for span in spans:
        if span.track.startswith(prefix):
            tracks.setdefault(span.track, []).append(span)
    return tracks


def gb_per_s(num_bytes: int, seconds: float) -> str:
    """Return a rate in 1e9 bytes per second."""
    return f"{num_bytes / seconds / 1e9:.1f}"


@contextmanager
def progress(title: str, total: int) -> Iterator[Step]:
    """Show how many of `total` steps are done, on a terminal."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield Step(bar, bar.add_task(title, total=total))


class Step:
    """Moves a progress bar on."""

    def __init__(self, bar: Progress, task: object) -> None:
        self._bar, self._task = bar, task

    def __call__(self, what: str = "") -> None:
        """One step is done; `what` comes next."""
        self._bar.update(self._task, advance=1, description=what or None)  # type: ignore[arg-type]


def wait_for_quiet(limit_s: float = PATIENCE_S) -> None:
    """Wait until little else runs on this machine, at most `limit_s`; what is seen then goes into `machine`."""
    end = time.monotonic() + limit_s
    while (load := _busy_cores()) > _QUIET_LOAD and time.monotonic() < end:
        time.sleep(1.0)
    _seen.append(load)


def _busy_cores(seconds: float = 1.0) -> float:
    """Return how many cores were busy over `seconds`."""
    before = _cpu_ticks()
    time.sleep(seconds)
    return (_cpu_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def _cpu_ticks() -> int:
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, soft, _steal = map(int, fields)
    return user + nice + system + irq + soft


def machine() -> Section:
    """Return what this was measured on, and how quiet it was."""
    rows = (
        ("CPU", f"{_proc('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores"),
        ("memory", f"{int(_proc('/proc/meminfo', 'MemTotal').split()[0]) / 1e6:.0f} GB"),
        ("kernel", f"{platform.system()} {platform.release()}"),
        ("Python", platform.python_version()),
        ("torch", str(torch.__version__)),
        ("date", time.strftime("%Y-%m-%d", time.gmtime())),
        ("busy with other work before a series", f"{median(_seen):.1f} cores, at most {max(_seen):.1f}"),
        ("verify", "as each row says; `digest` where no row does"),
    )
    return Section("machine", "Machine", ("what", "value"), rows)


def _proc(path: str, key: str) -> str:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "unknown")
