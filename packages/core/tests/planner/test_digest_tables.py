"""Digest tables: both sides sum up the same elements with the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World, make_world, numpy_dtype, receive, view

from headrace.config import MIB, UpdateSettings
from headrace.plan import DigestTable
from headrace.planner import Planner, ReceiverNeeds, receiver_digests
from headrace.types import WorkerId


def sums(table: DigestTable, blocks: list[np.ndarray]) -> dict[int, int]:
    """Sum (index + 1) * bits modulo 2^64 per group: any function of both will do."""
    out: dict[int, int] = {}
    for i in range(len(table)):
        shape = tuple(table.shape[i].tolist())
        strides = tuple(table.strides[i].tolist())
        src, dst = numpy_dtype(int(table.src_dtype[i])), numpy_dtype(int(table.dst_dtype[i]))
        values = view(blocks[table.block[i]], int(table.base[i]), shape, strides, src).get().astype(dst)
        bits = values.view(f"u{dst.itemsize}").astype(np.uint64)
        places = np.ravel_multi_index(
            np.meshgrid(
                *(o + np.arange(n) for o, n in zip(table.offsets[i], shape, strict=True)), indexing="ij"
            ),
            tuple(table.extents[i].tolist()),
        )
        group = int(table.group[i])
        total = int(((places.astype(np.uint64) + np.uint64(1)) * bits).sum(dtype=np.uint64))
        out[group] = (out.get(group, 0) + total) % 2**64
    return out


def holders_sums(world: World, tables: dict[int, DigestTable]) -> dict[int, int]:
    out: dict[int, int] = {}
    for holder, table in tables.items():
        for group, total in sums(table, world.segments[holder]).items():
            out[group] = (out.get(group, 0) + total) % 2**64
    return out


@pytest.mark.parametrize("choices", [{}, {"transport": "tcp"}, {"route": "broadcast"}])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), overlaps=st.booleans())
def test_both_sides_agree(choices: dict[str, str], seed: int, overlaps: bool) -> None:
    world = make_world(seed, overlaps=overlaps)
    need = ReceiverNeeds(
        worker=WorkerId("a", 0), recipe=world.recipe, reachable=frozenset({0, 1, 2}), budget_bytes=MIB
    )
    update = Planner().plan(world.manifests, [need], UpdateSettings(**choices))
    blocks, _ = receive(world, update)
    mine = sums(receiver_digests(world.recipe), blocks)
    assert holders_sums(world, update.digests[0]) == mine
    for table in update.digests[0].values():
        names = [world.recipe.sources[int(p)].shape for p in world.recipe.regions.param]
        assert set(table.ndim.tolist()) <= {len(shape) for shape in names} | {
            len(world.recipe.sources[i].shape) for i in world.recipe.opaque.tolist()
        }
