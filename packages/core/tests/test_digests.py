"""Digests against a slow oracle, over boxes, layouts and dtypes of every kind."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.digests import FOLD_BYTES, digest
from headrace.digests.factors import ROW_SEED, WORD_SEED, splitmix64
from headrace.digests.summing import _device_sum
from headrace.errors import PlanError
from headrace.geometry import Box, contiguous_strides
from headrace.plan import DigestTable
from headrace.types import DTYPES, dtype_code

MASK = (1 << 64) - 1
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CASTS = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32"), ("float32", "float64"),
         ("float32", "float8_e4m3fn"), ("float64", "float16")]  # fmt: skip


@dataclass
class Row:
    """One row of a digest table, in elements of the source dtype."""

    box: Box
    extents: tuple[int, ...]
    base: int
    strides: tuple[int, ...]
    src: str
    dst: str
    group: int = 0
    block: int = 0


def table_of(rows: list[Row], width: int = 4) -> DigestTable:
    def wide(values: list[Any], fill: int) -> np.ndarray:
        return np.array([[*v, *[fill] * (width - len(v))] for v in values], np.int64).reshape(
            len(rows), width
        )

    sizes = [DTYPES[dtype_code(r.src)].itemsize for r in rows]
    return DigestTable(
        offsets=wide([r.box.offsets for r in rows], 0),
        shape=wide([r.box.shape for r in rows], 1),
        extents=wide([r.extents for r in rows], 1),
        ndim=np.array([len(r.extents) for r in rows], np.uint8),
        block=np.array([r.block for r in rows], np.int32),
        base=np.array([r.base for r in rows], np.int64),
        strides=wide([[s * size for s in r.strides] for r, size in zip(rows, sizes, strict=True)], 0),
        src_dtype=np.array([dtype_code(r.src) for r in rows], np.uint8),
        dst_dtype=np.array([dtype_code(r.dst) for r in rows], np.uint8),
        group=np.array([r.group for r in rows], np.int32),
    )


def oracle(row: Row, memory: torch.Tensor) -> int:
    """Sum up byte by byte: every byte of the box is a word of its own with zeros around it."""
    size = DTYPES[dtype_code(row.dst)].itemsize
    src_size = DTYPES[dtype_code(row.src)].itemsize
    src, dst = getattr(torch, row.src), getattr(torch, row.dst)
    total = 0
    for index in np.ndindex(*row.box.shape):
        at = row.base + src_size * sum(i * s for i, s in zip(index, row.strides, strict=True))
        element = memory[at : at + src_size].clone().view(src)
        bits = (element if src == dst else element.to(dst)).view(torch.uint8).tolist()
        where = tuple(o + i for o, i in zip(row.box.offsets, index, strict=True))
        column = (where[-1] if where else 0) * size
        line = int(np.ravel_multi_index(where[:-1], row.extents[:-1])) if len(where) > 1 else 0
        if len(where) == 1 and row.extents[0] * size > FOLD_BYTES:
            line, column = divmod(column, FOLD_BYTES)
        for shift, byte in enumerate(bits):
            word, lane = divmod(column + shift, 8)
            a, b = (int(splitmix64(i, i + 1, seed)[0]) for i, seed in ((line, ROW_SEED), (word, WORD_SEED)))
            total += a * b * (byte << 8 * lane)
    return total & MASK


def random_memory(num_bytes: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8))


def finite_memory(dtype: str, count: int, seed: int) -> torch.Tensor:
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(count) * 3)
    return values.to(getattr(torch, dtype)).view(torch.uint8)


@st.composite
def placed_rows(draw: st.DrawFn) -> Row:
    rank = draw(st.integers(0, 4))
    extents = tuple(draw(st.integers(1, 9)) for _ in range(rank))
    begin = tuple(draw(st.integers(0, e - 1)) for e in extents)
    shape = tuple(
        draw(st.integers(0 if draw(st.booleans()) else 1, e - b)) for e, b in zip(extents, begin, strict=True)
    )
    order = draw(st.permutations(range(rank)))
    dense = contiguous_strides([shape[d] + draw(st.integers(0, 2)) for d in order])
    strides = [0] * rank
    for d, stride in zip(order, dense, strict=True):
        strides[d] = stride
    return Row(Box(begin, shape), extents, draw(st.integers(0, 24)), tuple(strides), "", "")


def span_bytes(row: Row, size: int) -> int:
    return row.base + size * (1 + sum(n * s for n, s in zip(row.box.shape, row.strides, strict=True)))


@QUICK
@given(row=placed_rows(), dtype=st.sampled_from([d.name for d in DTYPES]), seed=st.integers(0, 2**32))
def test_equals_oracle_for_every_layout_and_dtype(row: Row, dtype: str, seed: int) -> None:
    row = replace(row, src=dtype, dst=dtype)
    memory = random_memory(span_bytes(row, DTYPES[dtype_code(dtype)].itemsize), seed)
    assert int(digest(table_of([row]), [memory])[0]) == oracle(row, memory)


@QUICK
@given(row=placed_rows(), cast=st.sampled_from(CASTS), seed=st.integers(0, 2**32))
def test_counts_the_bits_after_the_cast(row: Row, cast: tuple[str, str], seed: int) -> None:
    size = DTYPES[dtype_code(cast[0])].itemsize
    row = replace(row, src=cast[0], dst=cast[1], base=row.base // size * size)
    memory = finite_memory(cast[0], -(-span_bytes(row, size) // size), seed)
    assert int(digest(table_of([row]), [memory])[0]) == oracle(row, memory)


@QUICK
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    cuts=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 11)), max_size=4),
    dtype=st.sampled_from(["bfloat16", "float32", "uint8"]),
)
def test_is_additive_over_disjoint_boxes(shape: list[int], cuts: list[tuple[int, int]], dtype: str) -> None:
    boxes = [Box.whole(tuple(shape))]
    for dim, at in cuts:
        boxes = [piece for box in boxes for piece in cut(box, dim, at)]
    size = DTYPES[dtype_code(dtype)].itemsize
    memory = random_memory(prod(shape) * size, seed=sum(shape))
    strides = contiguous_strides(shape)
    rows = [
        Row(
            b,
            tuple(shape),
            size * sum(o * s for o, s in zip(b.offsets, strides, strict=True)),
            strides,
            dtype,
            dtype,
        )
        for b in boxes
    ]
    whole = Row(Box.whole(tuple(shape)), tuple(shape), 0, strides, dtype, dtype)
    assert digest(table_of(rows), [memory]) == digest(table_of([whole]), [memory])


def cut(box: Box, dim: int, at: int) -> list[Box]:
    if dim >= len(box.shape) or not box.offsets[dim] < at < box.offsets[dim] + box.shape[dim]:
        return [box]
    first = at - box.offsets[dim]
    low, high = list(box.shape), list(box.shape)
    low[dim], high[dim] = first, box.shape[dim] - first
    offsets = list(box.offsets)
    offsets[dim] = at
    return [Box(box.offsets, tuple(low)), Box(tuple(offsets), tuple(high))]


def whole_digest(tensor: torch.Tensor) -> int:
    name = str(tensor.dtype).removeprefix("torch.")
    row = Row(Box.whole(tuple(tensor.shape)), tuple(tensor.shape), 0, tensor.stride(), name, name)
    return int(digest(table_of([row]), [tensor])[0])


def test_a_live_parameter_is_read_through_its_storage() -> None:
    big = torch.randn(64, 48, generator=torch.Generator().manual_seed(3))
    view = big[5:21, 8:40]
    assert whole_digest(view) == whole_digest(view.contiguous())
    assert whole_digest(view.t().contiguous().t()) == whole_digest(view.contiguous())


@pytest.mark.parametrize("change", ["rows", "columns", "bit", "experts"])
def test_sees_swaps_and_single_bits(change: str) -> None:
    tensor = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    other = tensor.clone()
    if change == "rows":
        other[1, [2, 9]] = tensor[1, [9, 2]]
    elif change == "columns":
        other[..., [3, 7]] = tensor[..., [7, 3]]
    elif change == "experts":
        other[[0, 2]] = tensor[[2, 0]]
    else:
        other.view(torch.int16)[3, 15, 23] ^= -(1 << 15)
    assert whole_digest(tensor) != whole_digest(other)


@QUICK
@given(
    begin=st.integers(0, 99_000),
    length=st.integers(0, 99_000),
    dtype=st.sampled_from(["bfloat16", "uint8", "int64"]),
)
def test_long_vectors_are_folded_alike_on_both_sides(begin: int, length: int, dtype: str) -> None:
    total = 100_000
    length = min(length, total - begin)
    size = DTYPES[dtype_code(dtype)].itemsize
    memory = random_memory(total * size, seed=7)
    cuts = [0, begin, begin + length, total]
    parts = [Row(Box((a,), (b - a,)), (total,), a * size, (1,), dtype, dtype) for a, b in pairwise(cuts)]
    whole = Row(Box((0,), (total,)), (total,), 0, (1,), dtype, dtype)
    assert digest(table_of(parts), [memory]) == digest(table_of([whole]), [memory])


def test_folded_vector_equals_oracle() -> None:
    total = FOLD_BYTES + 40
    memory = random_memory(total, seed=5)
    for begin, end in ((FOLD_BYTES - 11, FOLD_BYTES + 13), (FOLD_BYTES + 3, FOLD_BYTES + 9), (8, 24)):
        row = Row(Box((begin,), (end - begin,)), (total,), begin, (1,), "uint8", "uint8")
        assert int(digest(table_of([row]), [memory])[0]) == oracle(row, memory)


@pytest.mark.parametrize("strided", [False, True])
def test_large_pieces_are_cut_without_a_seam(strided: bool) -> None:
    tensor = torch.randn(3, 70, 4_100, generator=torch.Generator().manual_seed(2))
    wide = torch.zeros(3, 70, 8_200)[..., ::2].copy_(tensor) if strided else tensor
    rows = [
        Row(
            Box((0, 0, a), (3, 70, b - a)),
            (3, 70, 4_100),
            4 * a * (2 if strided else 1),
            wide.stride(),
            "float32",
            "bfloat16",
        )
        for a, b in ((0, 1), (1, 4_099), (4_099, 4_100))
    ]
    assert int(digest(table_of(rows), [wide])[0]) == whole_digest(tensor.bfloat16())
    long = torch.randn(1, 700_003, generator=torch.Generator().manual_seed(2))
    row = Row(Box((0, 1), (1, 700_001)), (1, 700_003), 4, (700_003, 1), "float32", "bfloat16")
    edges = [
        Row(Box((0, a), (1, 1)), (1, 700_003), 4 * a, (1, 1), "float32", "bfloat16") for a in (0, 700_002)
    ]
    assert int(digest(table_of([row, *edges]), [long])[0]) == whole_digest(long.bfloat16())


def test_groups_threads_and_empty_tables() -> None:
    memory = random_memory(64 * 100, seed=11)
    rows = [
        Row(Box((0, 0), (4, 8)), (4, 8), 64 * i, (8, 1), "int16", "int16", group=i % 7) for i in range(100)
    ]
    one = digest(table_of(rows), [memory], num_groups=9)
    assert one.dtype == np.uint64
    assert one.shape == (9,)
    assert one[7] == one[8] == 0
    assert (digest(table_of(rows), [memory], num_groups=9, num_threads=3) == one).all()
    singles = [int(digest(table_of([replace(r, group=0)]), [memory])[0]) for r in rows]
    assert one.tolist()[:7] == [sum(singles[g::7]) & MASK for g in range(7)]
    assert digest(table_of([]), []).shape == (0,)


def test_accelerator_sum_equals_the_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.digests.summing._DEVICE_WORDS", 64)
    matrix, rows, columns = (
        torch.from_numpy(np.random.default_rng(i).integers(-(2**63), 2**63 - 1, shape))
        for i, shape in enumerate([(37, 11), 37, 11])
    )
    assert _device_sum(matrix, rows, columns) == torch.dot(torch.mv(matrix, columns), rows)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base", 10_000),
        ("base", -8),
        ("block", 1),
        ("group", -1),
        ("strides", -16),
        ("shape", 9),
        ("extents", 3),
    ],
)
def test_foreign_rows_outside_memory_are_refused(field: str, value: int) -> None:
    table = table_of([Row(Box((0, 0), (4, 8)), (4, 8), 0, (8, 1), "int16", "int16")])
    column = np.array(getattr(table, field))
    column.flat[0] = value
    broken = DigestTable(**{f.name: getattr(table, f.name) for f in fields(table)} | {field: column})
    with pytest.raises(PlanError):
        digest(broken, [torch.zeros(64, dtype=torch.uint8)])
