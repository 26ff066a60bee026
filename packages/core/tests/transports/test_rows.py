"""Arithmetic on copy tables, against enumeration."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import PlanError
from headrace.geometry import dense_strides
from headrace.plan import CopyTable
from headrace.testing.copies import CopyRow, table_of
from headrace.transports.rows import Rows, batches, cut_rows, joined_spans, packed_bases

pytestmark = pytest.mark.timeout(60)

Address = tuple[int, int, int, int]


@st.composite
def rows(draw: st.DrawFn) -> CopyRow:
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=ndim, max_size=ndim)))
    strides = st.lists(st.integers(0, 40), min_size=ndim, max_size=ndim)
    return CopyRow(
        shape=shape,
        src_strides=tuple(draw(strides)),
        dst_strides=tuple(draw(strides)),
        src_base=draw(st.integers(0, 100)),
        dst_base=draw(st.integers(0, 100)),
        src_block=draw(st.integers(0, 2)),
        src_dtype=draw(st.sampled_from(["bfloat16", "int8", "float64"])),
    )


def addresses(copies: CopyTable) -> list[Address]:
    """Where every element comes from and goes to, in order."""
    found = []
    for row in range(len(copies)):
        for index in product(*(range(extent) for extent in copies.shape[row].tolist())):
            src = int(copies.src_base[row] + np.dot(index, copies.src_strides[row]))
            dst = int(copies.dst_base[row] + np.dot(index, copies.dst_strides[row]))
            found.append((int(copies.src_block[row]), src, int(copies.dst_block[row]), dst))
    return found


@settings(deadline=None)
@given(st.lists(rows(), max_size=6), st.integers(8, 200))
def test_cutting_keeps_every_element_in_order(wanted: list[CopyRow], limit: int) -> None:
    copies = table_of(wanted)
    cut = cut_rows(copies, limit)
    assert addresses(cut) == addresses(copies)
    assert (Rows.sources(cut).num_bytes <= limit).all()


@given(st.lists(rows(), min_size=1, max_size=6), st.integers(8, 50))
def test_cutting_spares_the_rows_it_is_not_asked_to_cut(wanted: list[CopyRow], limit: int) -> None:
    copies = table_of(wanted)
    spared = np.arange(len(copies)) % 2 == 0
    cut = cut_rows(copies, limit, ~spared)
    assert addresses(cut) == addresses(copies)
    assert Rows.sources(cut).num_bytes.max() >= Rows.sources(copies).num_bytes[spared].max(initial=0)


@given(st.lists(rows(), min_size=1, max_size=8))
def test_dense_means_one_run_of_bytes(wanted: list[CopyRow]) -> None:
    copies = table_of(wanted)
    side = Rows.sources(copies)
    for row, dense in enumerate(side.dense.tolist()):
        item = int(side.itemsize[row])
        begins = [src for _, src, _, _ in addresses(copies.take(slice(row, row + 1)))]
        run = [int(side.base[row]) + i * item for i in range(len(begins))]
        assert dense == (begins == run)
    packed = dense_strides(side.shape, side.itemsize)
    assert Rows(side.block, side.base, packed, side.shape, side.dtype).dense.all()


@given(st.lists(rows(), min_size=1, max_size=8), st.integers(0, 400))
def test_check_refuses_exactly_what_reaches_outside(wanted: list[CopyRow], size: int) -> None:
    copies = table_of(wanted)
    side = Rows.sources(copies)
    item = np.repeat(side.itemsize, copies.num_elements)
    fits = all(
        src + width <= size for (_, src, _, _), width in zip(addresses(copies), item.tolist(), strict=True)
    )
    if fits:
        side.check([size] * 3, "source")
    else:
        with pytest.raises(PlanError, match="source of copy"):
            side.check([size] * 3, "source")


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=40), st.integers(60, 200))
def test_batches_cover_rows_in_order_within_limits(items: list[tuple[bool, int]], limit: int) -> None:
    direct = np.array([kind for kind, _ in items], bool)
    sizes = np.array([size for _, size in items], np.int64)
    covered: list[int] = []
    for kind, part in batches(direct, sizes, limit, max_rows=7):
        assert (direct[part] == kind).all()
        assert part.stop - part.start <= 7
        assert kind or sizes[part].sum() <= limit
        covered += range(part.start, part.stop)
    assert covered == list(range(len(items)))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50), st.integers(1, 9)), max_size=20))
def test_spans_join_neighbours_only(items: list[tuple[int, int, int]]) -> None:
    block, base, size = (np.array([item[i] for item in items], np.int64) for i in range(3))
    spans = joined_spans(block.astype(np.int32), base, size)
    joined = [(b, byte) for b, begin, end in spans for byte in range(begin, end)]
    assert joined == [(b, byte) for b, begin, count in items for byte in range(begin, begin + count)]
    for (one, _, end), (two, begin, _) in pairwise(spans):
        assert (one, end) != (two, begin)


def test_packed_rows_follow_each_other() -> None:
    assert packed_bases(np.array([3, 0, 5])).tolist() == [0, 3, 3]
    assert cut_rows(CopyTable.empty(), 10).shape.shape == (0, 1)
