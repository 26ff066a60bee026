"""Box algebra on integers: what is covered, what overlaps, and where an element lies. No tensors here.

All boxes are half-open, `[offset, offset + shape)` per dim, in one parameter's global index space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from math import prod
from typing import Self

import numpy as np
import numpy.typing as npt

from headrace.types import I32, I64

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open integer box: `offsets[d] <= x[d] < offsets[d] + shape[d]`."""

    offsets: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """Return the box of a whole tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def num_elements(self) -> int:
        """Number of index points in the box."""
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """Return the common part, or None where there is none."""
        low = tuple(map(max, self.offsets, other.offsets))
        high = (
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.shape, other.offsets, other.shape, strict=True)
        )
        shape = tuple(h - lo for h, lo in zip(high, low, strict=True))
        return Box(low, shape) if all(extent > 0 for extent in shape) else None

    def subtract(self, other: Box) -> list[Box]:
        """Return disjoint boxes that cover what `other` leaves of this one (at most two per dim)."""
        common = self.intersect(other)
        if common is None:
            return [self]
        left: list[Box] = []
        offsets, shape = list(self.offsets), list(self.shape)
        for dim, (low, extent) in enumerate(zip(common.offsets, common.shape, strict=True)):
            for begin, end in ((offsets[dim], low), (low + extent, offsets[dim] + shape[dim])):
                if end > begin:
                    left.append(
                        Box(
                            (*offsets[:dim], begin, *offsets[dim + 1 :]),
                            (*shape[:dim], end - begin, *shape[dim + 1 :]),
                        )
                    )
            offsets[dim], shape[dim] = low, extent
        return left


def contiguous_strides(shape: Sequence[int], itemsize: int = 1) -> Shape:
    """Return row-major strides of `shape`, in units of `itemsize`."""
    strides, step = [], itemsize
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def dense_strides(shapes: I64, itemsize: I64 | int = 1) -> I64:
    """Return row-major strides of N shapes, shape (N, K), in units of `itemsize` (one, or shape (N,))."""
    inner = np.ones_like(shapes)
    inner[:, :-1] = np.cumprod(shapes[:, :0:-1], axis=1)[:, ::-1]
    return np.asarray(inner * np.reshape(itemsize, (-1, 1)))


def is_dense(strides: I64, shapes: I64, itemsize: I64) -> npt.NDArray[np.bool_]:
    """Return which of N strided boxes lie row-major without gaps, shape (N,); strides are in bytes, shape (N, K)."""
    return np.asarray(((strides == dense_strides(shapes, itemsize)) | (shapes <= 1)).all(axis=1))


def boxes_of_flat_range(shape: Shape, begin: int, end: int) -> list[Box]:
    """Cut the row-major flat range `[begin, end)` of a tensor of `shape` into boxes, in flat order.

    This is what ZeRO-3 and FSDP1 hold of a parameter. At most `2 * ndim - 1` boxes.
    """
    if begin >= end:
        return []
    if not shape:
        return [Box((), ())]
    inner = prod(shape[1:])
    first, last = -(-begin // inner), end // inner
    if first > last:  # inside one row
        return _in_row(shape, begin // inner, begin % inner, end - begin // inner * inner)
    boxes = _in_row(shape, first - 1, begin % inner, inner) if begin % inner else []
    if last > first:
        boxes.append(Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    return boxes + (_in_row(shape, last, 0, end % inner) if end % inner else [])


def _in_row(shape: Shape, row: int, begin: int, end: int) -> list[Box]:
    return [Box((row, *b.offsets), (1, *b.shape)) for b in boxes_of_flat_range(shape[1:], begin, end)]


@dataclass(frozen=True, slots=True)
class Loop:
    """One dim of a strided copy: `extent` steps, each moving source and destination by their strides (elements)."""

    extent: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class PlacedBox:
    """A Box and where its elements lie: element `x` is at `base + sum((x - offsets) * strides)`."""

    box: Box
    base: int
    strides: Shape


def place_copy(
    shape: Shape, loops: Sequence[Loop], source: int, target: int, limit: int
) -> list[PlacedBox] | None:
    """Turn a strided copy out of a row-major tensor of `shape` into boxes of it, placed in the target.

    Args:
        shape: Shape of the whole source tensor; its layout is row-major and dense.
        loops: Dims of the copied view; strides in elements.
        source: Flat element offset of the view's first element in the source.
        target: Flat element offset of the view's first element in the target.
        limit: Most boxes to make.

    Returns:
        Boxes whose `base` and `strides` (one per source dim, elements) address the target, or None where it
        would take more than `limit`.
    """
    if any(loop.extent == 0 for loop in loops):
        return []
    dense = contiguous_strides(shape)
    start = _unravel(source, shape, dense)
    split = _split_loops([loop for loop in loops if loop.extent > 1], shape, dense, start)
    if split is None:
        return None
    kept, enumerated = split
    if prod(loop.extent for loop in enumerated) > limit:
        return None
    box_shape, strides = [1] * len(shape), [0] * len(shape)
    for dim, loop in kept.items():
        box_shape[dim], strides[dim] = loop.extent, loop.target
    placed = []
    for steps in product(*(range(loop.extent) for loop in enumerated)):
        shift = sum(i * loop.source for i, loop in zip(steps, enumerated, strict=True))
        base = target + sum(i * loop.target for i, loop in zip(steps, enumerated, strict=True))
        placed.append(
            PlacedBox(Box(_unravel(source + shift, shape, dense), tuple(box_shape)), base, tuple(strides))
        )
    return placed


def _unravel(flat: int, shape: Shape, dense: Shape) -> Shape:
    return tuple(flat // stride % extent for extent, stride in zip(shape, dense, strict=True))


def _split_loops(
    loops: list[Loop], shape: Shape, dense: Shape, start: Shape
) -> tuple[dict[int, Loop], list[Loop]] | None:
    """Sort loops into one per source dim (step 1) and those to enumerate; None where a loop wraps unevenly."""
    kept: dict[int, Loop] = {}
    enumerated: list[Loop] = []
    span = dict(enumerate(start))
    todo = sorted(loops, key=lambda loop: loop.source)
    while todo:
        loop = todo.pop(0)
        dim = _dim_of(loop.source, shape, dense)
        if dim is None:
            enumerated.append(loop)
            continue
        step = loop.source // dense[dim]
        if loop.source % dense[dim]:
            return None
        reach = span[dim] + (loop.extent - 1) * step
        if reach < shape[dim]:
            span[dim] = reach
            if step == 1 and dim not in kept:
                kept[dim] = loop
            else:
                enumerated.append(loop)
            continue
        per_row, uneven = divmod(shape[dim], step)
        if uneven or span[dim] >= step or loop.extent % per_row or dim == 0:
            return None
        todo[:0] = [
            Loop(per_row, loop.source, loop.target),
            Loop(loop.extent // per_row, loop.source * per_row, loop.target * per_row),
        ]
    return kept, enumerated


def _dim_of(stride: int, shape: Shape, dense: Shape) -> int | None:
    """Return the innermost dim whose dense stride is not above `stride`; None for a broadcast (stride 0)."""
    if stride == 0:
        return None
    candidates = [d for d in range(len(shape)) if shape[d] > 1 and dense[d] <= stride]
    return min(candidates) if candidates else None


@dataclass(frozen=True)
class RegionTable:
    """Placed boxes in columns: N regions of up to D dims, dims padded behind with extent 1 and stride 0.

    Element `x` of region `i` lies in memory block `block[i]` at byte
    `base[i] + sum((x - offsets[i]) * strides[i])`. The meaning of `param` and `block` belongs to the owner: in a
    manifest they index its parameters and segments, in a recipe its sources and targets.
    """

    param: I32
    """Parameter id, shape (N,)."""
    offsets: I64
    """First index of the box per dim, shape (N, D)."""
    shape: I64
    """Extent of the box per dim, shape (N, D)."""
    block: I32
    """Memory block, shape (N,)."""
    base: I64
    """Byte of the first element in the block, shape (N,)."""
    strides: I64
    """Bytes per step, shape (N, D)."""

    @classmethod
    def empty(cls, ndim: int = 1) -> Self:
        """Return a table without rows."""
        none, wide = np.zeros(0, np.int64), np.zeros((0, ndim), np.int64)
        return cls(none.astype(np.int32), wide, wide, none.astype(np.int32), none, wide)

    @classmethod
    def from_rows(
        cls, rows: Sequence[tuple[int, Box, int, int, Sequence[int]]], ndim: int | None = None
    ) -> Self:
        """Build from `(param, box, block, base, strides)` rows; bytes for `base` and `strides`."""
        width = max([ndim or 1, *(len(row[1].shape) for row in rows)])
        table = cls.empty(width)
        count = len(rows)
        offsets, shape, strides = (np.full((count, width), fill, np.int64) for fill in (0, 1, 0))
        for i, (_, box, _, _, steps) in enumerate(rows):
            rank = len(box.shape)
            offsets[i, :rank], shape[i, :rank], strides[i, :rank] = box.offsets, box.shape, steps
        param = np.fromiter((row[0] for row in rows), np.int32, count)
        block = np.fromiter((row[2] for row in rows), np.int32, count)
        base = np.fromiter((row[3] for row in rows), np.int64, count)
        return type(table)(param, offsets, shape, block, base, strides)

    def __len__(self) -> int:
        return len(self.param)

    @property
    def ndim(self) -> int:
        """Number of dim columns."""
        return int(self.offsets.shape[1])

    @property
    def num_elements(self) -> I64:
        """Elements per region, shape (N,)."""
        counts: I64 = self.shape.prod(axis=1)
        return counts

    @cached_property
    def key(self) -> str:
        """Digest of all columns: equal tables have equal keys."""
        digest = hashlib.sha256(str(self.ndim).encode())
        for column in fields(self):
            digest.update(np.ascontiguousarray(getattr(self, column.name)).tobytes())
        return digest.hexdigest()[:32]

    def take(self, rows: I64 | I32 | slice | np.ndarray) -> Self:
        """Return the selected rows (indices, mask or slice) in that order."""
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))

    def widened(self, ndim: int) -> Self:
        """Return the table with at least `ndim` dim columns."""
        extra = ndim - self.ndim
        if extra <= 0:
            return self
        pad = ((0, 0), (0, extra))
        return type(self)(
            self.param,
            np.pad(self.offsets, pad),
            np.pad(self.shape, pad, constant_values=1),
            self.block,
            self.base,
            np.pad(self.strides, pad),
        )

    @classmethod
    def concat(cls, tables: Sequence[RegionTable]) -> Self:
        """Join tables row after row."""
        if not tables:
            return cls.empty()
        width = max(table.ndim for table in tables)
        wide = [table.widened(width) for table in tables]
        return cls(*(np.concatenate([getattr(t, f.name) for t in wide]) for f in fields(cls)))

    def boxes(self, ndims: Sequence[int] | None = None) -> Iterator[Box]:
        """Yield each row's Box, cut to `ndims[i]` dims where given. For messages and tests, not for hot paths."""
        for i in range(len(self)):
            rank = self.ndim if ndims is None else ndims[i]
            yield Box(tuple(self.offsets[i, :rank].tolist()), tuple(self.shape[i, :rank].tolist()))
