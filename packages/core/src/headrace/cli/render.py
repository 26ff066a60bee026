"""An UpdateReport for people (a rich table) and for programs (JSON with documented keys)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.cli.console import format_bytes, format_seconds
from headrace.report import EngineReport, UpdateReport, WorkerReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from headrace.server.plan_report import PlannedWorker


def report_json(report: UpdateReport, memcpy_gb_per_s: float | None = None) -> dict[str, object]:
    """Return a report as plain data; seconds as numbers, bytes as integers.

    Keys: `update_id`, `version`, `step` (a trainer's, else None), `first` (recording and proof included), `cache`,
    `verify`, `bytes` (of all workers), `live_bytes` (written into live tensors in the pause), `seconds` (`read`,
    `plan`, `stage`, `commit`, `stall`, `total`, `overhead`), `gb_per_s` (live bytes over the longest commit, 1e9),
    `memcpy_gb_per_s` and `share_of_memcpy` (None where no ceiling was measured), `unused_names`,
    `engines`, each with `address`, `barrier` (`pause` or `hold`), `barrier_why` and `seconds` (`stall`), and
    `workers`, each with `instance`, `rank`, `route`, `transport`, `why`, `ring`, `bytes`, `live_bytes`, `casts`,
    `seconds` (`stage`, `commit`, `verify`), `opaque_names`, `left_names` (live tensors that the source has nothing
    for). Spans are in the trace, not here.

    Args:
        report: What an update returned.
        memcpy_gb_per_s: Measured ceiling of a plain memory copy on the same host, 1e9 bytes per second.
    """
    return {
        "update_id": report.update_id,
        "version": report.version,
        "step": report.step,
        "first": report.first,
        "cache": report.cache,
        "verify": report.verify,
        "bytes": report.num_bytes,
        "live_bytes": report.live_bytes,
        "seconds": {
            phase: getattr(report, f"{phase}_s")
            for phase in ("read", "plan", "stage", "commit", "stall", "total", "overhead")
        },
        "gb_per_s": report.gb_per_s,
        "memcpy_gb_per_s": memcpy_gb_per_s,
        "share_of_memcpy": _share(report, memcpy_gb_per_s),
        "unused_names": list(report.unused_names),
        "engines": [_engine_json(engine) for engine in report.engines],
        "workers": [_worker_json(worker) for worker in report.workers],
    }


def _engine_json(engine: EngineReport) -> dict[str, object]:
    return {
        "address": engine.address,
        "barrier": engine.barrier,
        "barrier_why": engine.why,
        "seconds": {"stall": engine.stall_s},
    }


def _worker_json(worker: WorkerReport) -> dict[str, object]:
    return {
        **way_json(worker),
        "seconds": {"stage": worker.stage_s, "commit": worker.commit_s, "verify": worker.verify_s},
        "opaque_names": list(worker.opaque_names),
        "left_names": list(worker.left_names),
    }


def way_json(worker: WorkerReport | PlannedWorker) -> dict[str, object]:
    """Return which way a worker's bytes took, or would take, as plain data."""
    return {
        "instance": worker.worker.instance,
        "rank": worker.worker.rank,
        "route": worker.route,
        "transport": worker.transport,
        "why": worker.why,
        "ring": worker.ring,
        "bytes": worker.num_bytes,
        "live_bytes": worker.live_bytes,
        "casts": list(worker.casts),
    }


def report_table(report: UpdateReport, memcpy_gb_per_s: float | None = None) -> Table:
    """Return one row per worker and a row for the whole update, which alone has stall and total."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=_title(report), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for heading in ("worker", "route"):
        table.add_column(heading, no_wrap=True)
    share = _share(report, memcpy_gb_per_s)
    for heading in ("bytes", "stage", "commit", "stall", "total", "GB/s", *(["of memcpy"] if share else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for worker in report.workers:
        table.add_row(*_worker_row(worker))
    table.add_section()
    seconds = (report.stage_s, report.commit_s, report.stall_s, report.total_s)
    table.add_row(
        "all",
        "",
        format_bytes(report.num_bytes),
        *map(format_seconds, seconds),
        f"{report.gb_per_s:.2f}",
        *([f"{share:.0%}"] if share else []),
        style="bold",
    )
    return table


def print_report(console: Console, report: UpdateReport, memcpy_gb_per_s: float | None = None) -> None:
    """Print the table, and below it why each route was taken, casts, unused and opaque names."""
    console.print(report_table(report, memcpy_gb_per_s))
    for line in _notes(report):
        console.print(line, markup=False)


def _title(report: UpdateReport) -> str:
    first = ", first update" if report.first else ""
    return f"version {report.version}: cache {report.cache}, verified by {report.verify}{first}"


def _worker_row(worker: WorkerReport) -> tuple[str, ...]:
    return (
        str(worker.worker),
        _way(worker),
        format_bytes(worker.num_bytes),
        format_seconds(worker.stage_s),
        format_seconds(worker.commit_s),
        "",
        "",
        f"{worker.gb_per_s:.2f}",
    )


def _way(worker: WorkerReport) -> str:
    return worker.route if worker.transport == "collective" else f"{worker.route} ({worker.transport})"


def _notes(report: UpdateReport) -> list[str]:
    reasons = dict.fromkeys(f"{_way(w)}: {w.why}" for w in report.workers)
    rings = dict.fromkeys(f"memory: {w.ring}" for w in report.workers if w.ring)
    casts = dict.fromkeys(f"cast: {cast}" for w in report.workers for cast in w.casts)
    opaque = dict.fromkeys(name for w in report.workers for name in w.opaque_names)
    engines = [f"{e.address} stood still for {format_seconds(e.stall_s)}" for e in report.engines]
    barriers = dict.fromkeys(f"{e.barrier}: {e.why}" for e in report.engines if e.why)
    notes = [*(engines if len(engines) > 1 else ()), *reasons, *rings, *barriers, *casts]
    if opaque:
        notes.append(f"through the engine's own loader: {_names(list(opaque))}")
    left = dict.fromkeys(name for w in report.workers for name in w.left_names)
    if left:
        notes.append(f"left as they were, the source has nothing for them: {_names(list(left))}")
    if report.unused_names:
        notes.append(f"unused names of the source: {_names(list(report.unused_names))}")
    return notes


def _names(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _share(report: UpdateReport, memcpy_gb_per_s: float | None) -> float | None:
    return report.gb_per_s / memcpy_gb_per_s if memcpy_gb_per_s else None
