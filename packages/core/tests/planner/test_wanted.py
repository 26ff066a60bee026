"""A plan needs only the regions that it is said to read: all other bytes of the holders are spoilt first."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World, check_received, make_world, receive

from headrace.config import MIB, UpdateSettings
from headrace.plan import UpdatePlan
from headrace.planner import Planner, ReceiverNeeds, planned_rows
from headrace.types import ITEMSIZES, WorkerId

RUNS = settings(max_examples=80, deadline=None, derandomize=True)
WAYS = (
    {"reachable": {0, 1, 2}},
    {"reachable": {1}, "transport": "tcp", "bucket_bytes": 4096},
    {"reachable": {0}, "route": "broadcast", "bucket_bytes": 4096},
)


def planned(world: World, way: dict[str, object]) -> UpdatePlan:
    choices = dict(way)
    reachable = frozenset(choices.pop("reachable"))
    need = ReceiverNeeds(
        worker=WorkerId("a", 0), recipe=world.recipe, reachable=reachable, budget_bytes=64 * MIB
    )
    return Planner().plan(world.manifests, [need], UpdateSettings(**choices))


def spoil(world: World, chosen: list[np.ndarray]) -> int:
    """Overwrite what no chosen region has; returns how many regions were not chosen."""
    spoilt = 0
    for manifest, segments, rows in zip(world.manifests, world.segments, chosen, strict=True):
        keep = [np.zeros(len(segment), bool) for segment in segments]
        regions = manifest.regions
        for row in rows.tolist():
            steps = [np.arange(n) * s for n, s in zip(regions.shape[row], regions.strides[row], strict=True)]
            first = regions.base[row] + sum(np.ix_(*steps)).reshape(-1)
            size = int(ITEMSIZES[manifest.params.dtype_codes[regions.param[row]]])
            keep[regions.block[row]][(first[:, None] + np.arange(size)).reshape(-1)] = True
        for segment, kept in zip(segments, keep, strict=True):
            segment[~kept] = 0xA5
        spoilt += len(regions) - len(rows)
    return spoilt


@RUNS
@given(st.integers(0, 2**32 - 1), st.sampled_from(WAYS), st.booleans())
def test_a_plan_reads_no_other_region(seed: int, way: dict[str, object], overlaps: bool) -> None:
    world = make_world(seed, overlaps=overlaps, extent=14)
    update = planned(world, way)
    spoil(world, planned_rows(update, world.manifests))
    check_received(world, *receive(world, update))


def test_replicas_that_nobody_reads_are_left_out() -> None:
    worlds = [make_world(seed) for seed in range(40)]
    left_out = [spoil(world, planned_rows(planned(world, WAYS[0]), world.manifests)) for world in worlds]
    assert sum(count > 0 for count in left_out) > 5
