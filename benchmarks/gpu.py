"""What an update costs on GPUs, beside the links' ceilings of the same run.

Run as `python -m benchmarks.gpu` on a machine with one GPU or more; `--write PAGE` replaces the tables of a page.
Workers are real processes with a receiver each, updated by a real parameter server over its whole path.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from benchmarks import _gpu, _peer
from benchmarks._common import Section, Spread, by_track
from benchmarks._models import TINY, Model
from benchmarks.all import report
from headrace.config import GIB, MIB
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer
from headrace.store.device import DeviceSource
from headrace.testing.bare_engine import BareEngine
from headrace.testing.engine_process import free_port
from headrace.testing.holding_crew import HoldingCrew
from headrace.testing.shapes import QWEN3_8B, QWEN3_30B_A3B

REPEATS = 5
WARM_UPS = 2
DENSE = Model("Qwen3-8B", QWEN3_8B)
MOE = Model("Qwen3-30B-A3B", QWEN3_30B_A3B)
STAGING_BYTES = 36 * GIB
RING_BYTES = GIB
SMALL_BYTES = 256 * MIB
COLUMNS = (
    "model", "GPUs", "tensors", "GB per GPU", "way", "verify", "copies ms", "GB/s per GPU", "ceiling", "share",
    "stall ms", "stage ms", "total ms", "device MiB",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row: `staged` by way of a buffer on the GPU."""

    model: Model
    world_size: int
    staged: bool = False
    verify: str = "none"


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of one GPU: from the host alone, from the host all at once (slowest), inside the GPU."""

    alone: float
    together: float
    inside: float


def measure_ceilings(engine: BareEngine) -> Ceilings:
    """Measure in the workers of an engine."""
    alone = [engine.call(rank, _gpu.host_to_device) for rank in range(engine.world_size)]
    together = engine.call_all(_gpu.host_to_device)
    inside = engine.call_all(_gpu.device_to_device)
    engine.call_all(_gpu.release)
    return Ceilings(min(alone), min(together), min(inside))


@dataclass
class Found:
    """What a series of cases gave: rows of updates, ceilings, rows of checkpoint-engine beside them."""

    rows: list[tuple[str, ...]]
    ceilings: Ceilings
    peers: list[tuple[str, ...]] = field(default_factory=list)


def measure(cases: Sequence[Case], repeats: int, buckets_gb: Sequence[int | None]) -> Found:
    """Measure cases of one model and world size with one engine; checks every byte after the last update of each.

    checkpoint-engine updates the same engine afterwards, where it is installed, once for each size of bucket.

    Raises:
        SystemExit: A worker does not hold the source's bytes.
    """
    model, world_size = cases[0].model, cases[0].world_size
    source = _gpu.PoolSource(model)
    with (
        tempfile.TemporaryDirectory() as cache,
        BareEngine(
            _gpu.gpu_worker, world_size, model, environment={"HEADRACE_RECIPE_CACHE": cache}
        ) as engine,
    ):
        found = Found([], measure_ceilings(engine))
        best_s = float("inf")
        with ParameterServer(source=source) as server:
            for case in cases:
                reports, extra = _update(case, engine, server, source, repeats)
                if not case.staged:
                    best_s = min(best_s, median(one.commit_s for one in reports))
                found.rows.append(_row(case, reports, extra, found.ceilings))
                print("  ".join(found.rows[-1]), flush=True)
        for bucket_gb in buckets_gb if _peer.is_installed() else ():
            found.peers.append(_measure_peer(cases[0], engine, bucket_gb, repeats, best_s))
            print("  ".join(found.peers[-1]), flush=True)
    return found


def _update(
    case: Case, engine: BareEngine, server: ParameterServer, source: _gpu.PoolSource, repeats: int
) -> tuple[list[UpdateReport], int]:
    """Return the updates' reports, and the most GPU memory that they took beside the live tensors."""
    reports, budget = [], STAGING_BYTES if case.staged else 0
    engine.call_all(_gpu.poison)
    for _ in range(WARM_UPS + repeats):
        source.version += 1
        engine.call_all(_gpu.device_peak)
        reports.append(server.update(engine.control, route="direct", verify=case.verify, budget_bytes=budget))
    extra = max(engine.call_all(_gpu.device_peak))
    _check(case.model, engine, source.version)
    return reports[WARM_UPS:], extra


def _check(model: Model, engine: BareEngine, version: int) -> None:
    """Compare every byte that workers hold with the version's."""
    for rank, wrong in enumerate(engine.call_all(_gpu.wrong_tensors, version)):
        if wrong:
            raise SystemExit(f"{model.name}: worker {rank} holds wrong bytes of {len(wrong)}: {wrong[:3]}")


def _measure_peer(
    case: Case, engine: BareEngine, bucket_gb: int | None, repeats: int, best_s: float
) -> tuple[str, ...]:
    """Let checkpoint-engine update the same workers; `best_s` is what Headrace's copies took."""
    gathers, updates, version = [], [], 1_000
    engine.call_all(_gpu.poison)
    with _peer.Peer(case.model, case.world_size, version, bucket_gb) as peer, _gpu.MemoryWatch() as memory:
        for _ in range(1 + repeats):
            gather_s, update_s = peer.update(
                lambda handles: engine.call_all(_peer.take_buckets, handles)
            )
            gathers.append(gather_s)
            updates.append(update_s)
    _check(case.model, engine, version)
    taken = Spread.of(updates[1:])
    return (
        case.model.name,
        str(case.world_size),
        "its own" if bucket_gb is None else f"{bucket_gb} GB",
        Spread.of(gathers[1:]).ms(),
        taken.ms(),
        f"{taken.median / best_s:.1f}",
        f"{memory.most_bytes / (1 << 20):,.0f}",
    )


def _row(case: Case, reports: Sequence[UpdateReport], extra: int, ceilings: Ceilings) -> tuple[str, ...]:
    copies = Spread.of([one.commit_s for one in reports])
    each = max(worker.live_bytes for worker in reports[0].workers)
    ceiling = ceilings.inside if case.staged else ceilings.together
    return (
        case.model.name,
        str(case.world_size),
        f"{len(case.model.params()):,}",
        f"{each / 1e9:.2f}",
        "staged" if case.staged else "straight",
        case.verify,
        copies.ms(),
        f"{each / copies.median / 1e9:.1f}",
        f"{ceiling / 1e9:.1f}",
        f"{each / copies.median / ceiling:.1%}",
        Spread.of([one.stall_s for one in reports]).ms(),
        Spread.of([one.stage_s for one in reports]).ms(),
        Spread.of([one.total_s for one in reports]).ms(),
        f"{extra / (1 << 20):,.0f}",
    )


def measure_colocated(model: Model, repeats: int) -> tuple[str, ...]:
    """Measure a trainer's row shards on two GPUs going to workers of the same two, read where they are.

    Raises:
        SystemExit: A worker does not hold the source's bytes.
    """
    nvlink = _gpu.peer_to_peer()
    torch.cuda.empty_cache()
    source, reports = DeviceSource(_gpu.make_shards(model, 2)), []
    pools = [_gpu.make_pool().to(f"cuda:{gpu}") for gpu in range(2)]
    with (
        tempfile.TemporaryDirectory() as cache,
        BareEngine(_gpu.gpu_worker, 2, model, environment={"HEADRACE_RECIPE_CACHE": cache}) as engine,
        ParameterServer(source=source) as server,
    ):
        inside = min(engine.call_all(_gpu.device_to_device))
        engine.call_all(_gpu.release)
        engine.call_all(_gpu.poison)
        for version in range(WARM_UPS + repeats):
            _gpu.write_shards(source.shards, pools, version)
            reports.append(server.update(engine.control, route="direct", verify="none"))
        _check(model, engine, WARM_UPS + repeats - 1)
    kept = reports[WARM_UPS:]
    copies, each = Spread.of([one.commit_s for one in kept]), max(w.live_bytes for w in kept[0].workers)
    far = max(_gpu.bytes_of_peers(model, 2, rank) for rank in range(2))
    # Every GPU's memory writes all its bytes and reads as many, for itself or for the other: a copy inside a GPU.
    floor = max(far / nvlink, each / inside)
    return (
        model.name,
        f"{len(model.params()):,}",
        f"{each / 1e9:.2f}",
        f"{far / 1e9:.2f}",
        copies.ms(),
        f"{each / copies.median / 1e9:.0f}",
        f"{nvlink / 1e9:.0f}",
        f"{inside / 1e9:.0f}",
        f"{floor / copies.median:.1%}",
        Spread.of([one.stall_s for one in kept]).ms(),
        Spread.of([one.total_s for one in kept]).ms(),
    )


def measure_broadcast(model: Model, repeats: int, budget_bytes: int) -> tuple[str, ...]:
    """Measure a broadcast to two GPUs by two holders that each hold half, over rings in GPU memory.

    Raises:
        SystemExit: A worker does not hold the source's bytes.
    """
    version = multiprocessing.get_context("spawn").Value("q", 0)
    with (
        tempfile.TemporaryDirectory() as cache,
        BareEngine(_gpu.gpu_worker, 2, model, environment={"HEADRACE_RECIPE_CACHE": cache}) as engine,
        HoldingCrew(_gpu.pool_part, 2, model, version) as crew,
        ParameterServer(source=crew.source, launch=crew) as server,
    ):
        links = sum(engine.call_all(_gpu.host_to_device))
        nccl = min(engine.call_all(_gpu.broadcast, free_port()))
        engine.call_all(_gpu.release)
        engine.call_all(_gpu.poison)
        before, reports = engine.call_all(_gpu.device_used), []
        for _ in range(WARM_UPS + repeats):
            version.value += 1
            reports.append(
                server.update(engine.control, route="broadcast", verify="none", budget_bytes=budget_bytes)
            )
        taken = max(b - a for a, b in zip(before, engine.call_all(_gpu.device_used), strict=True))
        _check(model, engine, version.value)
    kept = reports[WARM_UPS:]
    total = sum(meta.num_bytes for meta in model.params())
    floor, moved = max(total / links, total / nccl), Spread.of([_moving_s(one) for one in kept])
    return (
        model.name,
        f"{len(model.params()):,}",
        f"{total / 1e9:.2f}",
        f"{kept[0].workers[0].transport}, {kept[0].workers[0].ring}",
        moved.ms(),
        f"{total / moved.median / 1e9:.1f}",
        f"{links / 1e9:.1f}",
        f"{nccl / 1e9:.0f}",
        f"{moved.median / floor:.2f}",
        Spread.of([one.stall_s for one in kept]).ms(),
        Spread.of([one.stage_s for one in kept]).ms(),
        Spread.of([one.total_s for one in kept]).ms(),
        f"{taken / MIB:,.0f}",
    )


def _moving_s(report: UpdateReport) -> float:
    """Return the time from a broadcast's first fill to the last copy into live tensors.

    What passes between the ring being full and the first copy, the engine's pause and the votes, is no part of it.
    """
    fills = [span for track in by_track(report.spans, "holder").values() for span in track if span.name == "fill"]
    copies = [span for track in by_track(report.spans).values() for span in track if span.name == "copy"]
    sent = [
        span for track in by_track(report.spans, "holder").values() for span in track if span.name == "broadcast"
    ]
    begin, first = min(span.begin_s for span in fills), min(span.begin_s for span in copies)
    ready = [end for span in sent if (end := span.begin_s + span.duration_s) <= first]
    waited = first - max(ready, default=first)
    return max(span.begin_s + span.duration_s for span in copies) - begin - waited


def measure_overhead(repeats: int) -> tuple[str, ...]:
    """Measure updates of next to nothing: what is left is the protocol."""
    source = _gpu.PoolSource(TINY)
    with (
        tempfile.TemporaryDirectory() as cache,
        BareEngine(_gpu.gpu_worker, 1, TINY, environment={"HEADRACE_RECIPE_CACHE": cache}) as engine,
        ParameterServer(source=source) as server,
    ):
        choices = {"route": "direct", "verify": "none", "budget_bytes": 0}
        reports = [server.update(engine.control, **choices) for _ in range(WARM_UPS + 4 * repeats)]
    kept = reports[WARM_UPS:]
    return (
        "one tiny tensor, 1 GPU",
        Spread.of([one.total_s for one in kept]).ms(),
        Spread.of([one.stall_s for one in kept]).ms(),
        Spread.of([one.commit_s for one in kept]).ms(),
    )


def measure_disturbance(model: Model, world_size: int) -> tuple[str, ...]:
    """Measure a loop of matrix products while weights are staged, against the same loop without."""
    source = _gpu.PoolSource(model)
    with (
        tempfile.TemporaryDirectory() as cache,
        BareEngine(
            _gpu.gpu_worker, world_size, model, environment={"HEADRACE_RECIPE_CACHE": cache}
        ) as engine,
        ParameterServer(source=source) as server,
    ):
        for _ in range(WARM_UPS + 1):
            source.version += 1
            server.update(engine.control, route="direct", verify="none", budget_bytes=STAGING_BYTES)
        engine.call_all(_gpu.start_products)
        spans = []
        for _ in range(3):
            source.version += 1
            done = server.update(engine.control, route="direct", verify="none", budget_bytes=STAGING_BYTES)
            spans += [
                span for track in by_track(done.spans).values() for span in track if span.name == "stage"
            ]
        rounds = [one for rank in engine.call_all(_gpu.stop_products) for one in rank]
    stages = [(span.begin_s, span.begin_s + span.duration_s) for span in spans]
    inside = [s for at, s in rounds if any(begin <= at and at + s <= end for begin, end in stages)]
    outside = [s for at, s in rounds if all(at + s < begin or at > end for begin, end in stages)]
    if not inside or not outside:
        return (model.name, "no round of the loop fell into a stage", "", "")
    alone, meanwhile = median(outside), median(inside)
    return (model.name, f"{alone * 1e3:.2f}", f"{meanwhile * 1e3:.2f}", f"{meanwhile / alone - 1:+.1%}")


def sections(repeats: int, names: Sequence[str]) -> list[Section]:
    """Measure what was chosen."""
    num_gpus, found, rows, tops, peers = torch.cuda.device_count(), [], [], [], []
    wanted = {
        "dense1": (Case(DENSE, 1), Case(DENSE, 1, staged=True)),
        "dense2": (Case(DENSE, 2), Case(DENSE, 2, verify="digest"), Case(DENSE, 2, staged=True)),
        "moe2": (Case(MOE, 2), Case(MOE, 2, staged=True)),
    }
    for name, cases in wanted.items():
        if name in names and cases[0].world_size <= num_gpus:
            made = measure(cases, repeats, (None, 1) if name == "dense2" else (None,))
            rows += made.rows
            peers += made.peers
            tops.append((cases[0], made.ceilings))
    if rows:
        found += [_ceiling_section(tops), Section("gpu-direct", _title(), COLUMNS, tuple(rows))]
    if peers:
        columns = (
            "model", "GPUs", "bucket", "gather_metas ms", "update ms", "times the copies of direct", "device MiB",
        )  # fmt: skip
        title = "checkpoint-engine 0.4.2 on the same workers: its whole update is a stall"
        found.append(Section("gpu-peer", title, columns, tuple(peers)))
    both = {"colocated": DENSE, "colocated-moe": MOE}
    colocated = [model for name, model in both.items() if name in names and num_gpus > 1]
    if colocated:
        columns = (
            "model", "tensors", "GB per GPU", "of it over NVLink", "copies ms", "GB/s per GPU", "NVLink, both ways",
            "inside a GPU", "share of the limit", "stall ms", "total ms",
        )  # fmt: skip
        title = "direct from a trainer's shards on the same two GPUs (rows to tensor parallel), read in place"
        made = tuple(measure_colocated(model, repeats) for model in colocated)
        found.append(Section("gpu-colocated", title, columns, made))
    sent = {
        "broadcast2": (DENSE, RING_BYTES), "broadcast2-moe": (MOE, RING_BYTES),
        "serial2": (DENSE, SMALL_BYTES), "serial2-moe": (MOE, SMALL_BYTES),
    }  # fmt: skip
    chosen = [pair for name, pair in sent.items() if name in names and num_gpus > 1]
    if chosen:
        columns = (
            "model", "tensors", "GB", "ring", "first fill to last copy ms", "GB/s", "both PCIe links GB/s",
            "NCCL broadcast GB/s", "times the limit", "stall ms", "stage ms", "total ms", "device MiB taken",
        )  # fmt: skip
        title = "broadcast to two GPUs, by two holders with a half each"
        made = tuple(measure_broadcast(model, repeats, budget) for model, budget in chosen)
        found.append(Section("gpu-broadcast", title, columns, made))
    if "overhead" in names:
        columns = ("update", "total ms", "stall ms", "copies ms")
        found.append(Section("gpu-overhead", "Nothing to move", columns, (measure_overhead(repeats),)))
    if "busy" in names:
        columns = ("model", "8 products alone ms", "while staging ms", "slower")
        row = measure_disturbance(DENSE, min(2, num_gpus))
        found.append(Section("gpu-busy", "A GPU that computes while weights are staged", columns, (row,)))
    return found


def _title() -> str:
    cpu = os.cpu_count()
    return (
        f"direct, {torch.cuda.device_count()}x {torch.cuda.get_device_name()}, {cpu} cores, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}: median (least-greatest)"
    )


def _ceiling_section(tops: Sequence[tuple[Case, Ceilings]]) -> Section:
    rows = tuple(
        (f"{case.model.name}, {case.world_size} GPUs", *(f"{v / 1e9:.1f}" for v in vars(top).values()))
        for case, top in tops
    )
    columns = ("run", "host to GPU, alone GB/s", "all at once, slowest GB/s", "inside a GPU GB/s")
    return Section("gpu-ceilings", "Ceilings of the same run", columns, rows)


def main() -> None:
    """Measure, print, and write the page."""
    names = (
        "dense1", "dense2", "moe2", "colocated", "colocated-moe", "broadcast2", "broadcast2-moe", "serial2",
        "serial2-moe", "overhead", "busy",
    )  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="replace the tables between this page's markers"
    )
    parser.add_argument("--only", choices=names, nargs="+", default=list(names), metavar="NAME")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch sees none; these benchmarks need at least one")
    for section in sections(chosen.repeats, chosen.only):
        report(section, chosen.write)
        Console(width=200).print(section.markdown(), markup=False)


if __name__ == "__main__":
    main()
