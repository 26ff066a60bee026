"""All routes side by side for a dense model of 1.2 GB, beside the loader of other systems and the ceilings.

Run as `python -m benchmarks.routes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks._ceiling import PlainCopy
from benchmarks._common import (
    REPEATS,
    WARM_UPS,
    Section,
    Spread,
    Step,
    commit_seconds,
    print_sections,
    progress,
    wait_for_quiet,
)
from benchmarks._loader import SharedTensors
from benchmarks._models import (
    DENSE,
    NUM_WORKERS,
    change,
    checksum,
    expected_checksum,
    make_tensors,
    worker_backend,
)
from benchmarks._wire import stream_seconds
from headrace.config import GIB, MIB
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer
from headrace.testing.bare_engine import BareEngine

NUM_STARTS = 3
COLUMNS = ("route", "verify", "total ms", "stage ms", "stall ms", "commit ms")


@dataclass(frozen=True)
class Route:
    """One row: its name, the update's choices, and the ring that the budget must lead to."""

    name: str
    ring: str
    choices: dict[str, Any] = field(default_factory=dict)


def _routes() -> tuple[Route, ...]:
    tcp, broadcast = {"route": "direct", "transport": "tcp"}, {"route": "broadcast"}
    overlapped, serial = {"budget_bytes": 256 * MIB}, {"budget_bytes": 3 * MIB // 2}
    return (
        Route("direct, memory", "none", {"route": "direct"}),
        Route("direct, memory, unverified", "none", {"route": "direct", "verify": "none"}),
        Route("direct, tcp, staged", "staged", tcp),
        Route("direct, tcp, overlapped (256 MiB)", "overlapped", tcp | overlapped),
        Route("broadcast, staged", "staged", broadcast),
        Route("broadcast, overlapped (256 MiB)", "overlapped", broadcast | overlapped),
        Route("broadcast, serial (1.5 MiB)", "serial", broadcast | serial),
    )


ROUTES = _routes()


def sections(repeats: int = REPEATS) -> list[Section]:
    """Measure everything."""
    tensors = make_tensors(DENSE)
    with progress("routes", NUM_STARTS + (len(ROUTES) + 1) * (WARM_UPS + repeats)) as step:
        first = _first_updates(tensors, step)
        rows = [_row("first update: loader, recording, proof", first)]
        with BareEngine(worker_backend, NUM_WORKERS, DENSE, 4 * GIB) as engine:
            rows += _following(engine, tensors, repeats, step)
            loader, ceilings = _beside(engine, tensors, repeats, step)
    rows.append(("the engine's loader in the pause (no Headrace)", "none", "", "", "", loader.ms()))
    copy, stream = ceilings
    notes = (
        f"Ceilings of the same run, {NUM_WORKERS} workers at once: one plain copy of all bytes {copy.ms()} ms; "
        f"plain TCP streams over loopback of as many bytes {stream.ms()} ms.",
        "The embedded holder copies the source's tensors anew in each total (`read`).",
    )
    title = f"Routes, {DENSE.name}, {NUM_WORKERS} workers on the CPU: ms, median (least-greatest)"
    return [Section("routes", title, COLUMNS, tuple(rows), notes)]


def _first_updates(tensors: dict[str, torch.Tensor], step: Step) -> list[UpdateReport]:
    """Update engines that were never updated before; the holder has its memory already."""
    reports = []
    with ParameterServer(tensors=tensors) as server:
        for _ in range(NUM_STARTS):
            step("routes, first update")
            with BareEngine(worker_backend, NUM_WORKERS, DENSE, 4 * GIB) as engine:
                reports.append(server.update(engine.control, route="direct"))
    if not all(report.first for report in reports):
        raise SystemExit("an engine that was never updated had a recipe")
    return reports


def _following(
    engine: BareEngine, tensors: dict[str, torch.Tensor], repeats: int, step: Step
) -> list[tuple[str, ...]]:
    rows = []
    with ParameterServer(tensors=tensors) as server:
        server.update(engine.control, route="direct")
        for route in ROUTES:
            reports = []
            wait_for_quiet()
            for _ in range(WARM_UPS + repeats):
                step(f"routes, {route.name}")
                change(tensors)
                reports.append(server.update(engine.control, **route.choices))
            _check(route, reports[-1])
            rows.append(_row(route.name, reports[WARM_UPS:]))
    for rank, found in enumerate(engine.call_all(checksum)):
        if found != expected_checksum(DENSE, rank, tensors):
            raise SystemExit(f"worker {rank} does not hold the source's bytes")
    return rows


def _check(route: Route, report: UpdateReport) -> None:
    ring = report.workers[0].ring
    if not ring.startswith(route.ring):
        raise SystemExit(f"{route.name} went another way: {ring}")


def _beside(
    engine: BareEngine, tensors: dict[str, torch.Tensor], repeats: int, step: Step
) -> tuple[Spread, tuple[Spread, Spread]]:
    """Return the loader's seconds in the pause, and those of a plain copy and of plain streams."""
    loads, copies, streams = [], [], []
    share = sum(tensor.nbytes for tensor in tensors.values()) // NUM_WORKERS // 8 * 8
    source = torch.zeros(share, dtype=torch.uint8)
    with SharedTensors(engine, tensors) as shared, PlainCopy(engine, share) as plain:
        for _ in range(WARM_UPS + repeats):
            step("routes, loader and ceilings")
            change(tensors)
            shared.write()
            loads.append(shared.load_seconds())
            copies.append(plain.seconds())
            streams.append(stream_seconds(engine, source, share))
    return Spread.of(loads[WARM_UPS:]), (Spread.of(copies[WARM_UPS:]), Spread.of(streams[WARM_UPS:]))


def _row(name: str, reports: Sequence[UpdateReport]) -> tuple[str, ...]:
    total = Spread.of([report.total_s for report in reports])
    stage = Spread.of([report.stage_s for report in reports])
    stall = Spread.of([report.stall_s for report in reports])
    commit = Spread.of([commit_seconds(report) for report in reports])
    return (name, reports[0].verify, total.ms(), stage.ms(), stall.ms(), commit.ms())


if __name__ == "__main__":
    print_sections(__doc__, sections, REPEATS)
