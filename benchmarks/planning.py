"""How long planning takes for models and clusters that fit no laptop: tables only, no weights.

Run as `python -m benchmarks.planning`. Each case has its own process: its peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console

from benchmarks._common import Section, progress
from headrace.config import GIB, UpdateSettings
from headrace.manifest import Manifest
from headrace.plan import UpdatePlan
from headrace.planner import Planner, ReceiverNeeds
from headrace.recipe import LoadRecipe
from headrace.testing.shapes import KIMI_K2, params_of, sharded_manifests, tp_recipe, whole_manifest
from headrace.types import ParamTable, WorkerId

TP_SIZE = 16
INSTANCES = 16
MEMORY_LIMIT_GB = 2.0
AGAIN_LIMIT_S = 0.010
DEADLINE_S = 300.0

World = tuple[list[Manifest], list[ReceiverNeeds], UpdateSettings]


@dataclass(frozen=True)
class Result:
    """One case's numbers.

    Attributes:
        first_s: A first plan.
        again_s: The next version of the same tables.

        num_copies: Copies of the first receiver.
        peak_gb: Peak memory of the process, recipes and manifests included.
    """

    first_s: float
    again_s: float
    decoded_s: float
    num_copies: int
    peak_gb: float


@dataclass(frozen=True)
class Case:
    """One situation: how it is called, how it is built, how long a first plan may take."""

    name: str
    build: Callable[[], World]
    limit_s: float


def main() -> int:
    """Run all cases and print the table; the exit status says whether every limit was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    wanted = parser.parse_args().only
    results = {case: _measure(case) for case in CASES if wanted in case.name}
    _section(results).show(Console(width=120))
    return 0 if all(_within(*item) for item in results.items()) else 1


def sections() -> list[Section]:
    """Measure all cases."""
    results = {}
    with progress("planning", len(CASES)) as step:
        for case in CASES:
            step(f"planning, {case.name}")
            results[case] = _measure(case)
    return [_section(results)]


def _section(results: dict[Case, Result]) -> Section:
    limits = f"Limits: again {AGAIN_LIMIT_S * 1e3:g} ms, peak {MEMORY_LIMIT_GB:g} GB."
    missed = [case.name for case, result in results.items() if not _within(case, result)]
    notes = (limits, f"Missed by: {', '.join(missed)}." if missed else "All kept.")
    columns = ("case", "copies", "first s", "limit s", "again ms", "decoded ms", "peak GB")
    rows = tuple(_row(*item) for item in results.items())
    return Section("planning", "Planning, Kimi-K2 shapes, TP16", columns, rows, notes)


def _row(case: Case, result: Result) -> tuple[str, ...]:
    return (
        case.name,
        f"{result.num_copies:,}",
        f"{result.first_s:.2f}",
        f"{case.limit_s:g}",
        f"{result.again_s * 1e3:.2f}",
        f"{result.decoded_s * 1e3:.0f}",
        f"{result.peak_gb:.2f}",
    )


def _within(case: Case, result: Result) -> bool:
    in_time = result.first_s <= case.limit_s and result.again_s <= AGAIN_LIMIT_S
    return in_time and result.peak_gb <= MEMORY_LIMIT_GB


def _measure(case: Case) -> Result:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(CASES.index(case), sending))
    process.start()
    sending.close()
    try:
        if not receiving.poll(DEADLINE_S):
            process.kill()
            raise SystemExit(f"{case.name}: no result within {DEADLINE_S:g} s")
        result: Result = receiving.recv()
    finally:
        process.join(timeout=10)
    return result


def _run(number: int, sending: Connection) -> None:
    manifests, needs, settings = CASES[number].build()
    for need in needs:
        _ = need.recipe.key
    planner = Planner()
    first_s, plan = _timed(planner, manifests, needs, settings)
    receiver, peak_gb = plan.receivers[0], _peak_gb()
    again_s, same = _timed(planner, [replace(m, version=2) for m in manifests], needs, settings)
    decoded_s, equal = _timed(planner, [_decoded(m) for m in manifests], needs, settings)
    if same is not plan or equal is not plan:
        raise SystemExit("an unchanged layout was planned again")
    sending.send(Result(first_s, again_s, decoded_s, len(receiver.apply), peak_gb))


def _decoded(manifest: Manifest) -> Manifest:
    """Return an equal manifest that shares nothing, as one that came over a wire."""
    return replace(
        manifest,
        version=3,
        params=ParamTable(list(manifest.params)),
        regions=manifest.regions.take(slice(None)),
    )


def _timed(
    planner: Planner, manifests: list[Manifest], needs: list[ReceiverNeeds], settings: UpdateSettings
) -> tuple[float, UpdatePlan]:
    begin = time.perf_counter()
    plan = planner.plan(manifests, needs, settings)
    return time.perf_counter() - begin, plan


def _peak_gb() -> float:
    """Return this process's peak; getrusage would count the parent that it was forked from."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def _recipes(count: int) -> tuple[ParamTable, list[LoadRecipe]]:
    params = params_of(KIMI_K2)
    return params, [tp_recipe(params, TP_SIZE, rank) for rank in range(count)]


def _one(settings: UpdateSettings, reachable: set[int], num_shards: int = 0) -> World:
    params, recipes = _recipes(1)
    manifests = (
        sharded_manifests(params, num_shards) if num_shards else [whole_manifest(params, num_segments=64)]
    )
    return manifests, [_need(0, 0, recipes[0], frozenset(reachable))], settings


def _need(instance: int, rank: int, recipe: LoadRecipe, reachable: frozenset[int]) -> ReceiverNeeds:
    worker = WorkerId(f"instance-{instance}", rank)
    return ReceiverNeeds(worker=worker, recipe=recipe, reachable=reachable, budget_bytes=4 * GIB)


def _one_mapped() -> World:
    return _one(UpdateSettings(), {0})


def _one_tcp() -> World:
    return _one(UpdateSettings(), set())


def _one_sharded() -> World:
    return _one(UpdateSettings(), set(range(TP_SIZE)), TP_SIZE)


def _many_mapped() -> World:
    """One host and one holder with everything per instance."""
    params, recipes = _recipes(TP_SIZE)
    manifests = [whole_manifest(params, f"host-{i}", num_segments=64) for i in range(INSTANCES)]
    needs = [_need(i, r, recipes[r], frozenset({i})) for i in range(INSTANCES) for r in range(TP_SIZE)]
    return manifests, needs, UpdateSettings()


def _many_tcp() -> World:
    """One holder somewhere; every receiver reads it over the network."""
    params, recipes = _recipes(TP_SIZE)
    needs = [_need(i, r, recipes[r], frozenset()) for i in range(INSTANCES) for r in range(TP_SIZE)]
    return [whole_manifest(params, num_segments=64)], needs, UpdateSettings()


def _many_broadcast() -> World:
    """Sixteen trainer ranks hold the rows between them, one on the host of each instance."""
    params, recipes = _recipes(TP_SIZE)
    needs = [_need(i, r, recipes[r], frozenset({i})) for i in range(INSTANCES) for r in range(TP_SIZE)]
    return sharded_manifests(params, TP_SIZE), needs, UpdateSettings()


CASES = (
    Case("1 receiver, memory", _one_mapped, 1.0),
    Case("1 receiver, tcp", _one_tcp, 1.0),
    Case("1 receiver, memory, 16 row shards", _one_sharded, 2.5),
    Case("256 receivers, memory, 16 replicas", _many_mapped, 20.0),
    Case("256 receivers, tcp", _many_tcp, 20.0),
    Case("256 receivers, broadcast, 16 row shards", _many_broadcast, 20.0),
)


if __name__ == "__main__":
    sys.exit(main())
