"""The join of needed boxes with held boxes: everything the planner does is this, used again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from headrace.geometry import Box, RegionTable
from headrace.types import I32, I64

Mask = npt.NDArray[np.bool_]

_SHIFT = 40
_CHUNK = 1 << 21


@dataclass(frozen=True)
class BoxIndex:
    """Boxes sorted by (parameter, begin along dim 0), so that those that can touch a need are one range.

    Attributes:
        param: Parameter of each box, shape (N,).
        offsets: Begin, shape (N, D).
        shape: Extents, shape (N, D).
        begins: `param * 2^40 + begin of dim 0`, ascending, shape (N,).
        ends: Running maximum of `param * 2^40 + end of dim 0`, shape (N,).
        overlapping: Whether any two boxes of a parameter overlap, shape (number of parameters,).
    """

    param: I32
    offsets: I64
    shape: I64
    begins: I64
    ends: I64
    overlapping: Mask

    @classmethod
    def build(cls, param: I32, offsets: I64, shape: I64, num_params: int) -> Self:
        """Index boxes that are sorted by (param, offsets[:, 0]) already and have no zero extents."""
        high = param.astype(np.int64) << _SHIFT
        begins = high + offsets[:, 0]
        ends = np.maximum.accumulate(high + offsets[:, 0] + shape[:, 0])
        plain = cls(param, offsets, shape, begins, ends, np.zeros(num_params, np.bool_))
        plain.overlapping[_overlapping(plain)] = True
        return plain

    def __len__(self) -> int:
        return len(self.param)


@dataclass(frozen=True)
class Pairs:
    """Which box serves which need: row `i` is a part of need `need[i]` that lies in box `box[i]`."""

    need: I64
    box: I64
    offsets: I64
    shape: I64

    def __len__(self) -> int:
        return len(self.need)

    @classmethod
    def concat(cls, parts: list[Pairs], ndim: int) -> Self:
        """Join parts row after row."""
        none, wide = np.zeros(0, np.int64), np.zeros((0, ndim), np.int64)
        columns = zip(*((p.need, p.box, p.offsets, p.shape) for p in parts), strict=True) if parts else ()
        joined = [np.concatenate(column) for column in columns]
        return cls(*joined) if joined else cls(none, none, wide, wide)


def all_dims(mask: npt.NDArray[np.bool_]) -> Mask:
    """Return the rows that are true in every column."""
    out = mask[:, 0].copy()
    for dim in range(1, mask.shape[1]):  # numpy reduces along short rows ten times slower
        out &= mask[:, dim]
    return out


def volumes(shape: I64) -> I64:
    """Return the product of each row."""
    out = shape[:, 0].copy()
    for dim in range(1, shape.shape[1]):
        out *= shape[:, dim]
    return out


def reaches(steps: I64, strides: I64) -> I64:
    """Return the sum of `steps * strides` of each row."""
    out = steps[:, 0] * strides[:, 0]
    for dim in range(1, steps.shape[1]):
        out += steps[:, dim] * strides[:, dim]
    return out


def fit_width(table: RegionTable, ndim: int) -> RegionTable:
    """Return the table with exactly `ndim` dim columns; more than a parameter has are padding and dropped."""
    if table.ndim <= ndim:
        return table.widened(ndim)
    cut = (slice(None), slice(None, ndim))
    return RegionTable(
        table.param, table.offsets[cut], table.shape[cut], table.block, table.base, table.strides[cut]
    )


def restrict(table: RegionTable, rows: I64, offsets: I64, shape: I64) -> RegionTable:
    """Return the boxes `(offsets, shape)`, row `i` placed where `table`'s row `rows[i]` places it."""
    strides = table.strides[rows]
    base = table.base[rows] + reaches(offsets - table.offsets[rows], strides)
    return RegionTable(table.param[rows], offsets, shape, table.block[rows], base, strides)


def join(needs: RegionTable, index: BoxIndex) -> Pairs:
    """Intersect needs with boxes so that no element of a need is served twice; what nobody holds is left out.

    Args:
        needs: Boxes without zero extents, in the index's parameters and number of dims.
        index: What is held.
    """
    first, last = _candidates(needs.param, needs.offsets, needs.shape, index)
    counts = np.maximum(last - first, 0)
    messy = index.overlapping[needs.param]
    parts = [_intersect(needs, index, rows, first, counts) for rows in _chunks(np.where(messy, 0, counts))]
    parts += [_peel(needs, index, int(row), int(first[row]), int(last[row])) for row in np.flatnonzero(messy)]
    return parts[0] if len(parts) == 1 else Pairs.concat(parts, needs.ndim)


def uncovered(needs: RegionTable, pairs: Pairs) -> I64:
    """Return the rows of `needs` that `pairs` (of one `join`) does not serve wholly."""
    served = np.bincount(pairs.need, weights=volumes(pairs.shape), minlength=len(needs))
    return np.flatnonzero(served < volumes(needs.shape))


def holes(needs: RegionTable, index: BoxIndex, row: int) -> list[Box]:
    """Return the boxes of one need that no box of the index covers."""
    first, last = _candidates(needs.param, needs.offsets, needs.shape, index)
    left = [_box(needs.offsets[row], needs.shape[row])]
    for i in range(int(first[row]), int(last[row])):
        held = _box(index.offsets[i], index.shape[i])
        left = [rest for box in left for rest in box.subtract(held)]
    return left


def _candidates(param: I32, offsets: I64, shape: I64, index: BoxIndex) -> tuple[I64, I64]:
    low = (param.astype(np.int64) << _SHIFT) + offsets[:, 0]
    first = np.searchsorted(index.ends, low, side="right")
    return first, np.searchsorted(index.begins, low + shape[:, 0], side="left")


def _chunks(counts: I64) -> Iterator[slice]:
    """Yield row ranges that have few enough candidates to be intersected at once."""
    total = np.cumsum(counts)
    begin, count = 0, len(counts)
    while begin < count:
        done = int(total[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(total, done + _CHUNK, side="right")), begin + 1)
        yield slice(begin, end)
        begin = end


def _intersect(needs: RegionTable, index: BoxIndex, rows: slice, first: I64, counts: I64) -> Pairs:
    num = np.where(index.overlapping[needs.param[rows]], 0, counts[rows])
    need = np.repeat(np.arange(rows.start, min(rows.stop, len(needs))), num)
    box = np.arange(len(need)) + np.repeat(first[rows] - np.cumsum(num) + num, num)
    low, other = needs.offsets[need], index.offsets[box]
    high = np.minimum(low + needs.shape[need], other + index.shape[box])
    low = np.maximum(low, other)
    shape = high - low
    keep = all_dims(shape > 0)
    return (
        Pairs(need, box, low, shape) if keep.all() else Pairs(need[keep], box[keep], low[keep], shape[keep])
    )


def _peel(needs: RegionTable, index: BoxIndex, row: int, first: int, last: int) -> Pairs:
    """Serve one need from boxes that overlap: the largest first, each gives what is still missing."""
    volumes = index.shape[first:last].prod(axis=1)
    left = [_box(needs.offsets[row], needs.shape[row])]
    found: list[tuple[int, Box]] = []
    for i in (first + np.argsort(-volumes, kind="stable")).tolist():
        held = _box(index.offsets[i], index.shape[i])
        common = [part for box in left if (part := box.intersect(held))]
        found += [(i, part) for part in common]
        left = [rest for box in left for rest in box.subtract(held)] if common else left
    return Pairs(
        np.full(len(found), row),
        np.fromiter((i for i, _ in found), np.int64, len(found)),
        np.array([part.offsets for _, part in found], np.int64).reshape(-1, needs.ndim),
        np.array([part.shape for _, part in found], np.int64).reshape(-1, needs.ndim),
    )


def _box(offsets: I64, shape: I64) -> Box:
    return Box(tuple(offsets.tolist()), tuple(shape.tolist()))


def _overlapping(index: BoxIndex) -> I32:
    """Return the parameters of which two boxes overlap: first by chains along one dim, then pair by pair."""
    rows = np.arange(len(index))
    for dim in range(index.offsets.shape[1]):
        order = rows if dim == 0 else rows[np.lexsort((index.offsets[rows, dim], index.param[rows]))]
        begin = index.offsets[order, dim]
        end = begin + index.shape[order, dim]
        bad = (index.param[order[1:]] == index.param[order[:-1]]) & (end[:-1] > begin[1:])
        if not bad.any():
            return index.param[:0]
        rows = rows[np.isin(index.param[rows], index.param[order[1:]][bad])]
    return _overlapping_pairs(index, rows)


def _overlapping_pairs(index: BoxIndex, rows: I64) -> I32:
    none, wide = np.zeros(len(rows), np.int64), np.zeros((len(rows), index.shape.shape[1]), np.int64)
    asked = RegionTable(
        index.param[rows], index.offsets[rows], index.shape[rows], none.astype(np.int32), none, wide
    )
    first, last = _candidates(asked.param, asked.offsets, asked.shape, index)
    counts = np.maximum(last - first, 0)
    found = []
    for part in _chunks(counts):
        pairs = _intersect(asked, index, part, first, counts)
        found.append(asked.param[pairs.need[rows[pairs.need] != pairs.box]])
    return np.unique(np.concatenate(found)) if found else index.param[:0]
