"""`headrace plan`: what an update would move where, and why, for running engines or for a simulated cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.console import format_bytes, format_seconds, print_json, stdout
from headrace.cli.options import (
    BucketMib,
    BudgetGib,
    Ca,
    Certificate,
    Headers,
    Holders,
    Insecure,
    ReadyS,
    Route,
    Strict,
    ToOption,
    Transport,
    bucket_bytes,
    budget_bytes,
    engine_targets,
    unchecked,
)
from headrace.cli.render import way_json
from headrace.cli.serving import serving
from headrace.cli.simulated_fabric import fabric_json, fabric_table, is_fabric, predictions
from headrace.config import Deadlines, EngineTarget, UpdateSettings
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from headrace.server.plan_report import PlannedWorker, PlanReport

_MOST_HOLDERS = 3
_MOST_NAMES = 5


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)


def plan(
    checkpoint: Annotated[Path | None, typer.Option(help="Folder or file of safetensors.")] = None,
    to: Annotated[list[str] | None, ToOption] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            help="A cluster instead: tp=8,instances=4,hosts=2,holders=8. Without a checkpoint its links alone: "
            "gb=1030,tp=16,hosts=32,nic-gbit=400; or `published`."
        ),
    ] = None,
    route: Route = "auto",
    transport: Transport = "auto",
    version: Annotated[int | None, typer.Option(help="Version to plan for.")] = None,
    strict: Strict = False,
    holders: Holders = None,
    budget_gib: BudgetGib = None,
    bucket_mib: BucketMib = 64.0,
    gb_per_s: Annotated[
        float | None, typer.Option(help="Speed of every worker's and holder's link, for a prediction.")
    ] = None,
    ready_s: ReadyS = 600.0,
    header: Headers = None,
    ca: Ca = None,
    cert: Certificate = None,
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an update would move where, and why; no engine is paused, no weight is changed."""
    if simulate and is_fabric(simulate):
        _print_fabric(simulate, as_json=as_json)
        return
    if checkpoint is None:
        raise ConfigError(
            "a plan needs a --checkpoint, or a --simulate that names gb=SIZE", name="checkpoint"
        )
    settings = UpdateSettings(
        route=unchecked(route),
        transport=transport,
        version=version,
        strict=strict,
        budget_bytes=budget_bytes(budget_gib),
        bucket_bytes=bucket_bytes(bucket_mib),
        deadlines=Deadlines(ready_s=ready_s),
    )
    if bool(to) == bool(simulate):
        raise ConfigError("give either engines with --to, or a cluster with --simulate", name="to")
    if gb_per_s is not None and gb_per_s <= 0:
        raise ConfigError(f"--gb-per-s is {gb_per_s}; it must be above 0", name="gb-per-s")
    if simulate:
        report = _simulated(checkpoint, simulate, settings, holders)
    else:
        report = _real(checkpoint, engine_targets(to or [], header, ca, cert, insecure), settings, holders)
    if as_json:
        print_json(plan_json(report, gb_per_s))
    else:
        _print(report, gb_per_s)


def _print_fabric(spec: str, *, as_json: bool) -> None:
    found = predictions(spec)
    if as_json:
        print_json(fabric_json(found))
    else:
        stdout().print(fabric_table(found))


def _simulated(checkpoint: Path, spec: str, settings: UpdateSettings, holders: int | None) -> PlanReport:
    from headrace.cli.simulated import Cluster, simulate

    if holders is not None:
        raise ConfigError("a simulated cluster names its holders in --simulate: holders=N", name="holders")
    return simulate(checkpoint, Cluster.parse(spec), settings)


def _real(
    checkpoint: Path, to: list[EngineTarget], settings: UpdateSettings, holders: int | None
) -> PlanReport:
    from headrace.cli.progress import UpdateProgress

    with serving(checkpoint, holders) as server, UpdateProgress() as progress:
        return server.plan(to, settings, progress=progress)


def predicted_s(report: PlanReport, gb_per_s: float) -> float:
    """Return how long the bytes take: the busiest link decides, of a worker or, over a network, of a holder."""
    busiest = max((worker.num_bytes for worker in report.workers), default=0)
    given: Counter[int] = Counter()
    for worker in report.workers:
        if worker.route != "broadcast" and worker.transport != "memory":
            given.update(worker.from_holders)
    return max(busiest, *given.values(), 0) / gb_per_s / 1e9


def plan_json(report: PlanReport, gb_per_s: float | None = None) -> dict[str, object]:
    """Return a plan as plain data.

    Keys: `version`, `bytes` (that reach all workers), `plan_s`, `gb_per_s` and `predicted_s` (None where no speed was
    given), `unused_names`, `holders` (`name`, `bytes`), and `workers`, each with `instance`, `rank`, `route`,
    `transport`, `why`, `ring`, `bytes`, `live_bytes`, `from_holders` (holder's name to bytes), `num_copies`,
    `num_buckets`, `opaque_names`, `opaque_reasons`, `casts`.
    """
    return {
        "version": report.version,
        "bytes": report.num_bytes,
        "plan_s": report.plan_s,
        "gb_per_s": gb_per_s,
        "predicted_s": None if gb_per_s is None else predicted_s(report, gb_per_s),
        "unused_names": list(report.unused_names),
        "holders": [{"name": name, "bytes": held} for name, held in report.holders],
        "workers": [_worker_json(worker, report) for worker in report.workers],
    }


def _worker_json(worker: PlannedWorker, report: PlanReport) -> dict[str, object]:
    return {
        **way_json(worker),
        "from_holders": {report.holders[holder][0]: given for holder, given in worker.from_holders.items()},
        "num_copies": worker.num_copies,
        "num_buckets": worker.num_buckets,
        "opaque_names": list(worker.opaque),
        "opaque_reasons": worker.opaque_reasons,
    }


def _print(report: PlanReport, gb_per_s: float | None) -> None:
    console = stdout()
    console.print(plan_table(report))
    for line in _notes(report, gb_per_s):
        console.print(line, markup=False, soft_wrap=True)


def plan_table(report: PlanReport) -> Table:
    """Return one row per kind of worker: those that do the same share one."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    counts = f"workers: {len(report.workers)}, holders: {len(report.holders)}"
    title = f"version {report.version}, {counts}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("workers")
    table.add_column("route", no_wrap=True)
    table.add_column("from")
    for heading in ("bytes", "written", "copies", "buckets"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[object, ...], list[PlannedWorker]] = {}
    for worker in report.workers:
        groups.setdefault(_kind(worker), []).append(worker)
    for members in groups.values():
        table.add_row(*_row(members, report))
    return table


def _kind(worker: PlannedWorker) -> tuple[object, ...]:
    given = tuple(sorted(worker.from_holders.items()))
    return (worker.route, worker.transport, worker.num_bytes, worker.live_bytes, given, worker.num_copies)


def _row(members: list[PlannedWorker], report: PlanReport) -> tuple[str, ...]:
    first = members[0]
    name = str(first.worker) + (f" and {len(members) - 1} more" if len(members) > 1 else "")
    return (
        name,
        _way(first),
        _from(first, report),
        format_bytes(first.num_bytes),
        format_bytes(first.live_bytes),
        f"{first.num_copies:,}",
        str(first.num_buckets),
    )


def _way(worker: PlannedWorker) -> str:
    return worker.route if worker.transport == "collective" else f"{worker.route} ({worker.transport})"


def _from(worker: PlannedWorker, report: PlanReport) -> str:
    given = worker.from_holders
    if len(given) > _MOST_HOLDERS:
        least, most = map(format_bytes, (min(given.values()), max(given.values())))
        return f"{len(given)} holders, {least} to {most} each"
    return ", ".join(f"{report.holders[holder][0]} {format_bytes(sent)}" for holder, sent in given.items())


def _notes(report: PlanReport, gb_per_s: float | None) -> Iterator[str]:
    workers = report.workers
    yield from dict.fromkeys(f"{_way(w)}: {w.why}" for w in workers)
    yield from dict.fromkeys(f"memory: {w.ring}" for w in workers)
    yield from dict.fromkeys(f"cast: {cast}" for w in workers for cast in w.casts)
    opaque = list(dict.fromkeys(name for w in workers for name in w.opaque))
    if opaque:
        yield f"through the engine's own loader: {_some(opaque)}"
        reasons = Counter(reason for w in workers for reason in w.opaque_reasons.values())
        yield from (
            f"  because {reason} ({count} tensors)" for reason, count in reasons.most_common(_MOST_NAMES)
        )
    if report.unused_names:
        yield f"unused names of the source: {_some(list(report.unused_names))}"
    yield f"planned in {format_seconds(report.plan_s)}"
    if gb_per_s is not None:
        yield f"at {gb_per_s:g} GB/s per link the bytes take {format_seconds(predicted_s(report, gb_per_s))}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
