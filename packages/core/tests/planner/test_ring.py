"""Ring choice, cutting and packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import BUCKET_BYTES, GIB, MIB
from headrace.errors import CapacityError
from headrace.geometry import Box, RegionTable
from headrace.plan import buffered, staged_bytes
from headrace.planner.ring import ALIGN_BYTES, choose_ring, cut, device_bucket_bytes, mapped_ring, pack
from headrace.testing.copies import CopyRow, table_of


@pytest.mark.parametrize(
    ("budget", "mode", "slot", "depth"),
    [
        (1000 * MIB, "staged", 64 * MIB, 4),
        (256 * MIB, "staged", 64 * MIB, 4),
        (255 * MIB, "overlapped", 64 * MIB, 3),
        (128 * MIB, "overlapped", 64 * MIB, 2),
        (127 * MIB, "overlapped", 32 * MIB, 3),
        (2 * MIB, "overlapped", MIB, 2),
        (2 * MIB - 1, "serial", 2 * MIB - 4096, 1),
        (5000, "serial", 4096, 1),
    ],
)
def test_the_budget_decides(budget: int, mode: str, slot: int, depth: int) -> None:
    ring = choose_ring(256 * MIB, budget, 64 * MIB)
    assert (ring.mode, ring.slot_bytes, ring.depth) == (mode, slot, depth)
    assert ring.slot_bytes * ring.depth <= budget
    assert ring.why


def test_no_room_says_how_much() -> None:
    with pytest.raises(CapacityError, match=r"at least 4 KiB are needed"):
        choose_ring(MIB, 4095, MIB)
    with pytest.raises(CapacityError, match=r"1.004 MiB are needed \(1 MiB of it for opaque buffers\)"):
        choose_ring(MIB, MIB, MIB, reserved_bytes=MIB)
    assert choose_ring(0, 0, MIB).mode == "none"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(8, 300))
def test_cut_pieces_tile_the_box(shape: list[int], limit: int) -> None:
    table = RegionTable.from_rows([(0, Box((1,) * len(shape), tuple(shape)), 0, 0, (0,) * len(shape))])
    pieces, rows = cut(table, np.array([8]), limit)
    assert int((pieces.num_elements * 8).max()) <= limit
    assert set(rows.tolist()) == {0}
    seen = np.zeros([n + 1 for n in shape], np.int64)
    for box in pieces.boxes([len(shape)] * len(pieces)):
        seen[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))] += 1
    assert (seen[(slice(1, None),) * len(shape)] == 1).all()
    assert int(seen.sum()) == int(np.prod(shape))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 640)), max_size=40))
def test_packed_rows_do_not_touch(rows: list[tuple[int, int]]) -> None:
    rows = sorted(rows, key=lambda row: row[0])
    owner = np.array([row[0] for row in rows], np.int32)
    sizes = np.array([row[1] for row in rows], np.int64)
    packing = pack(owner, sizes, 640)
    assert (packing.offset % ALIGN_BYTES == 0).all()
    assert (packing.owner[packing.bucket] == owner).all()
    for bucket in range(len(packing.owner)):
        inside = np.flatnonzero(packing.bucket == bucket)
        begin, end = packing.offset[inside], packing.offset[inside] + sizes[inside]
        assert (begin[1:] >= end[:-1]).all()
        assert end[-1] == packing.num_bytes[bucket] <= 640
    turns = [np.cumsum(packing.owner == o) for o in np.unique(owner)]
    full = min((int(t[-1]) for t in turns), default=0) * len(turns)
    assert len(set(packing.owner[: len(turns)].tolist())) == len(turns) or not full


def test_a_gpu_stages_where_its_budget_has_room() -> None:
    copies = table_of([CopyRow(shape=(n,), src_strides=(2,), dst_strides=(2,)) for n in (64, 65, 1)])
    needed = 128 + 256 + 128
    assert staged_bytes(copies).tolist() == [128, 256, 128]
    roomy, tight = (mapped_ring(copies, room, on_gpu=True) for room in (needed, needed - 1))
    assert (roomy.mode, roomy.slot_bytes, roomy.depth) == ("device", needed, 1)
    assert tight.mode == "none"
    assert "do not fit" in tight.why
    assert mapped_ring(copies.take(slice(0)), 0, on_gpu=True).mode == "none"


def test_a_host_gathers_scattered_rows_before_the_pause() -> None:
    rows = [
        CopyRow(shape=(4, 32), src_strides=(128, 2), dst_strides=(64, 2)),
        CopyRow(shape=(4, 32), src_strides=(64, 2), dst_strides=(64, 2)),
        CopyRow(shape=(4, 32), src_strides=(128, 2), dst_strides=(96, 2)),
        CopyRow(shape=(1, 32), src_strides=(128, 2), dst_strides=(64, 2)),
        CopyRow(shape=(4, 32), src_strides=(256, 4), dst_strides=(64, 2), src_dtype="float32"),
    ]
    copies = table_of(rows)
    assert buffered(copies, "gathered").tolist() == [True, False, False, False, False]
    assert not buffered(copies, "none").any()
    assert buffered(copies, "device").all()
    roomy, tight = (mapped_ring(copies, room, on_gpu=False) for room in (256, 255))
    assert (roomy.mode, roomy.slot_bytes, roomy.depth) == ("gathered", 256, 1)
    assert tight.mode == "none"


@pytest.mark.parametrize(
    ("asked", "room", "bucket", "depth"),
    [
        (BUCKET_BYTES, 8 * GIB, 256 * MIB, 4),
        (BUCKET_BYTES, GIB, 256 * MIB, 4),
        (BUCKET_BYTES, 512 * MIB, 128 * MIB, 4),
        (BUCKET_BYTES, 256 * MIB, 64 * MIB, 4),
        (BUCKET_BYTES, 100 * MIB, 64 * MIB, 3),
        (16 * MIB, GIB, 16 * MIB, 4),
    ],
)
def test_rings_in_gpu_memory_take_large_buckets(asked: int, room: int, bucket: int, depth: int) -> None:
    assert device_bucket_bytes(asked, room) == bucket
    ring = choose_ring(20 * GIB, room, bucket)
    assert (ring.mode, ring.depth) == ("overlapped", depth)
    assert ring.slot_bytes * ring.depth <= room
