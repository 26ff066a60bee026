"""Buckets out of mapped memory: what goes by way of a buffer, and which rows are told to differ."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from headrace.plan import Ring, RingMode, TransferPlan
from headrace.receiver.blocks import StagingArea
from headrace.receiver.buckets import mapped_bucket
from headrace.testing.copies import CopyRow, table_of

ROWS = [
    CopyRow(shape=(256,), src_strides=(1,), dst_strides=(1,), src_dtype="uint8", dst_dtype="uint8"),
    CopyRow(shape=(16, 8), src_strides=(16, 1), dst_strides=(8, 1), src_base=256, dst_base=256, src_dtype="uint8",
            dst_dtype="uint8"),
    CopyRow(shape=(16, 8), src_strides=(16, 1), dst_strides=(8, 1), src_base=264, dst_base=384, src_dtype="uint8",
            dst_dtype="uint8"),
    CopyRow(shape=(256,), src_strides=(1,), dst_strides=(1,), src_base=512, dst_base=0, dst_block=1, src_dtype="uint8",
            dst_dtype="uint8"),
]  # fmt: skip
"""Live: one dense row, two scattered ones; the last row goes into an opaque buffer."""


def plan_of(mode: RingMode) -> TransferPlan:
    none = np.zeros(0, np.int64)
    return TransferPlan(
        route="direct", transport="memory", why="", segments=(), segment_holder=none.astype(np.int32),
        fill=table_of([]), fill_starts=none, apply=table_of(ROWS), apply_starts=np.array([0, 2, 4]),
        bucket_owner=none.astype(np.int32), bucket_bytes=none, opaque=none.astype(np.int32), num_targets=1,
        num_bytes=768, ring=Ring(mode, 0, 0, ""), lent=np.zeros((0, 4), np.int64), key="",
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["none", "gathered", "device"])
def test_the_bytes_are_the_same_and_what_is_spoiled_is_named(mode: RingMode) -> None:
    source = torch.from_numpy(np.random.default_rng(3).integers(0, 256, 768).astype(np.uint8))
    live, opaque = torch.zeros(512, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
    plan = plan_of(mode)
    buckets = [mapped_bucket(plan, bounds, [source], [live, opaque], StagingArea()) for bounds in pairwise([0, 2, 4])]
    for bucket in buckets:
        bucket.run_early(5)
    assert not live.any()
    assert torch.equal(opaque, source[512:])
    for bucket in buckets:
        bucket.live.run()
    scattered = source[256:512].view(16, 2, 8).transpose(0, 1).flatten()
    assert torch.equal(live, torch.cat([source[:256], scattered]))
    assert [bucket.differences().tolist() for bucket in buckets] == [[], []]
    assert [row for bucket in buckets for row in bucket.staged_rows.tolist()] == {
        "none": [], "gathered": [1, 2], "device": [0, 1, 2]
    }[mode]  # fmt: skip
    live[0] ^= 1
    live[400] ^= 1
    assert [bucket.differences().tolist() for bucket in buckets] == [[0], [2]]


def test_a_spoiled_buffer_is_named_by_its_row() -> None:
    source = torch.from_numpy(np.random.default_rng(4).integers(0, 256, 768).astype(np.uint8))
    blocks = [torch.zeros(512, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)]
    bucket = mapped_bucket(plan_of("gathered"), (2, 4), [source], blocks, StagingArea())
    bucket.run_early(5)
    source[264] ^= 1
    bucket.live.run()
    assert bucket.differences().tolist() == [2]
