"""What an update costs that has next to nothing to move: enrolment, planning, votes, pause and resume.

Run as `python -m benchmarks.control`. Two workers each: bare ones, then the embedded engine over HTTP, idle and
while it generates.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from benchmarks._common import WARM_UPS, Section, Spread, Step, print_sections, progress
from benchmarks._models import NUM_WORKERS, TINY, make_tensors, worker_backend
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer
from headrace.testing.bare_engine import BareEngine
from headrace.testing.engine_process import EngineProcess, Stream
from headrace.testing.tiny_model import make_tiny_qwen3

REPEATS = 15
TARGET_S = 0.030
PHASES = ("enrol", "read", "describe", "plan", "stage", "pause", "prepare", "commit", "finish", "resume")
Update = Callable[[], UpdateReport]


@contextmanager
def bare_workers() -> Iterator[Update]:
    """Yield an update of bare workers, handed over by pipes."""
    with (
        BareEngine(worker_backend, NUM_WORKERS, TINY, 1 << 30) as engine,
        ParameterServer(tensors=make_tensors(TINY)) as server,
    ):
        yield lambda: server.update(engine.control, route="direct")


@contextmanager
def embedded_engine(*, busy: bool) -> Iterator[Update]:
    """Yield an update of a tiny model behind HTTP; with `busy` a request is being answered all the time."""
    with tempfile.TemporaryDirectory(prefix="headrace-benchmark-") as folder:
        model = make_tiny_qwen3(Path(folder), seed=3)
        with (
            EngineProcess(model, NUM_WORKERS) as engine,
            ParameterServer(checkpoint=model) as server,
            Stream(engine.url) if busy else nullcontext() as stream,
        ):
            if stream is not None:
                stream.wait_tokens(5)
            yield lambda: server.update(engine.target, route="direct")


def sections(repeats: int = REPEATS) -> list[Section]:
    """Measure all engines."""
    engines = {
        "bare workers": bare_workers(),
        "embedded engine, HTTP": embedded_engine(busy=False),
        "embedded engine, generating": embedded_engine(busy=True),
    }
    with progress("control", len(engines) * (WARM_UPS + 1 + repeats)) as step:
        reports = {name: _reports(name, engine, repeats, step) for name, engine in engines.items()}
    return [_section(reports)]


def _reports(
    name: str, engine: AbstractContextManager[Update], repeats: int, step: Step
) -> list[UpdateReport]:
    with engine as update:
        reports = []
        for _ in range(WARM_UPS + 1 + repeats):
            step(f"control, {name}")
            reports.append(update())
    return reports[WARM_UPS + 1 :]


def _section(reports: dict[str, list[UpdateReport]]) -> Section:
    totals = {name: Spread.of([one.total_s for one in kept]) for name, kept in reports.items()}
    rows = [("total", *(total.ms() for total in totals.values()))]
    rows += [("stall", *(Spread.of([one.stall_s for one in kept]).ms() for kept in reports.values()))]
    rows += [(phase, *(_phase(kept, phase).ms() for kept in reports.values())) for phase in PHASES]
    reached = ", ".join(f"{name} {total.median * 1e3:.1f} ms" for name, total in totals.items())
    note = f"To reach: {TARGET_S * 1e3:.0f} ms in all. Reached: {reached}. Verify mode: digest."
    title = f"An update that moves no bytes to speak of, {NUM_WORKERS} workers: ms, median (least-greatest)"
    return Section("control", title, ("phase", *reports), tuple(rows), (note,))


def _phase(reports: list[UpdateReport], name: str) -> Spread:
    return Spread.of(
        [
            sum(span.duration_s for span in report.spans if (span.track, span.name) == ("updater", name))
            for report in reports
        ]
    )


if __name__ == "__main__":
    print_sections(__doc__, sections, REPEATS)
