"""Bytes land in fresh segments, in sealed ones and in any other block as copies put them there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.segments import HostSegment
from headrace.testing.copies import CopyRow, content, table_of
from headrace.transports.landing import land
from headrace.transports.program import CopyProgram

pytestmark = pytest.mark.timeout(60)

SIZE = 1 << 20
ROWS = [
    CopyRow(shape=(3001,), src_strides=(2,), dst_strides=(2,), src_base=1000, dst_base=4090),
    CopyRow(shape=(1,), src_strides=(2,), dst_strides=(2,), src_base=6, dst_base=SIZE - 2),
    CopyRow(shape=(0,), src_strides=(2,), dst_strides=(2,), src_base=0, dst_base=0),
    CopyRow(shape=(16, 64), src_strides=(256, 2), dst_strides=(128, 2), src_base=9000, dst_base=70000),
    CopyRow(shape=(512,), src_strides=(2,), dst_strides=(4,), dst_dtype="float32", src_base=0, dst_base=90000),
]


@pytest.mark.parametrize("kind", ["fresh", "sealed", "plain"])
def test_bytes_land_as_copies_put_them_there(kind: str) -> None:
    copies, source = table_of(ROWS), content(1, SIZE)
    expected = torch.zeros(SIZE, dtype=torch.uint8)
    CopyProgram(copies, [source], [expected]).run()
    with HostSegment(SIZE, sealed=kind != "fresh") as segment:
        block = torch.zeros(SIZE, dtype=torch.uint8) if kind == "plain" else segment.tensor
        land(copies, [source], [block])
        assert np.array_equal(block.numpy(), expected.numpy())
