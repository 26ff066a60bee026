"""What the engine's loader reads where it lies: no buffer, no budget, but read all the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from headrace.config import UpdateSettings
from headrace.errors import CapacityError
from headrace.geometry import RegionTable
from headrace.manifest import Manifest
from headrace.plan import UpdatePlan
from headrace.planner import Planner, ReceiverNeeds, planned_rows
from headrace.recipe import FillTable, LoadRecipe
from headrace.testing.shapes import ModelShape, params_of, sharded_manifests, whole_manifest
from headrace.types import I32, WorkerId

PARAMS = params_of(
    ModelShape(layers=1, hidden=32, vocab=100, heads=2, kv_heads=2, head_dim=16, intermediate=48)
)
ALL: I32 = np.arange(len(PARAMS), dtype=np.int32)
NONE = np.zeros(0, np.int32)


def recipe(only_read: I32) -> LoadRecipe:
    """Return what a first update needs: every source goes through the loader."""
    empty = RegionTable.from_rows([], PARAMS.max_ndim)
    return LoadRecipe(PARAMS, PARAMS, empty, FillTable.empty(), ALL, NONE, {}, only_read=only_read)


def planned(manifests: list[Manifest], only_read: I32, budget_bytes: int, transport: str = "auto") -> UpdatePlan:
    needs = ReceiverNeeds(
        worker=WorkerId("engine", 0),
        recipe=recipe(only_read),
        reachable=frozenset(range(len(manifests))),
        budget_bytes=budget_bytes,
    )
    return Planner().plan(manifests, [needs], UpdateSettings(transport=transport))


def test_what_is_only_read_takes_no_memory() -> None:
    manifest = whole_manifest(PARAMS, num_segments=2)
    made = planned([manifest], ALL, 0)
    (plan,) = made.receivers
    assert len(plan.apply) == 0
    assert plan.num_bytes == sum(PARAMS.num_bytes.tolist())
    regions = manifest.regions
    for position, segment, begin, num_bytes in plan.lent.tolist():
        (row,) = np.flatnonzero(regions.param == plan.opaque[position])
        assert (begin, num_bytes) == (regions.base[row], PARAMS.num_bytes[position])
        assert plan.segments[segment] == manifest.segments[int(regions.block[row])]
    assert sorted(plan.lent[:, 0].tolist()) == ALL.tolist()
    assert planned_rows(made, [manifest])[0].tolist() == list(range(len(regions)))


def test_what_the_loader_may_change_needs_a_buffer() -> None:
    manifest, written = whole_manifest(PARAMS), 3
    some = np.setdiff1d(ALL, [written]).astype(np.int32)
    least = int(PARAMS.num_bytes[written])
    made = planned([manifest], some, least)
    (plan,) = made.receivers
    assert np.unique(plan.apply.dst_block).tolist() == [len(PARAMS) + written]
    assert planned_rows(made, [manifest])[0].tolist() == list(range(len(manifest.regions)))
    with pytest.raises(CapacityError, match="budget_bytes"):
        planned([manifest], some, least - 1)


def test_what_does_not_lie_whole_in_mapped_memory_needs_a_buffer() -> None:
    whole = sum(PARAMS.num_bytes.tolist())
    for manifests, transport in ((sharded_manifests(PARAMS, 2), "auto"), ([whole_manifest(PARAMS)], "tcp")):
        (plan,) = planned(manifests, ALL, 3 * whole, transport).receivers
        in_parts = [row for row, meta in enumerate(PARAMS) if meta.shape[0] > 1]
        assert not set(plan.lent[:, 0].tolist()) & set(in_parts if transport == "auto" else ALL.tolist())
        with pytest.raises(CapacityError):
            planned(manifests, ALL, 0, transport)


def test_misaligned_memory_is_not_lent() -> None:
    manifest = whole_manifest(PARAMS)
    longer = tuple(replace(segment, num_bytes=segment.num_bytes + 1) for segment in manifest.segments)
    shifted = replace(
        manifest, segments=longer, regions=replace(manifest.regions, base=manifest.regions.base + 1)
    )
    (plan,) = planned([shifted], ALL, 1 << 20).receivers
    assert len(plan.lent) == 0
