"""Arithmetic on the rows of copy tables: sizes, bounds, density, cutting. Integers only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from headrace.errors import PlanError
from headrace.geometry import is_dense
from headrace.plan import CopyTable
from headrace.types import DTYPES, I32, I64, ITEMSIZES, U8

_SAFE = float(1 << 62)

Mask = np.ndarray


@dataclass(frozen=True)
class Rows:
    """One side of a copy table: where every row's elements lie."""

    block: I32
    base: I64
    strides: I64
    shape: I64
    dtype: U8

    @classmethod
    def sources(cls, copies: CopyTable) -> Rows:
        """Return the source side."""
        return cls(copies.src_block, copies.src_base, copies.src_strides, copies.shape, copies.src_dtype)

    @classmethod
    def destinations(cls, copies: CopyTable) -> Rows:
        """Return the destination side."""
        return cls(copies.dst_block, copies.dst_base, copies.dst_strides, copies.shape, copies.dst_dtype)

    def __len__(self) -> int:
        return len(self.block)

    def take(self, rows: I64 | slice | Mask) -> Rows:
        """Return the selected rows in that order."""
        return Rows(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def itemsize(self) -> I64:
        """Bytes per element, shape (N,)."""
        return ITEMSIZES[self.dtype]

    @property
    def num_bytes(self) -> I64:
        """Bytes of a row's elements, densely, shape (N,)."""
        return np.asarray(self.shape.prod(axis=1) * self.itemsize)

    @property
    def dense(self) -> Mask:
        """Whether a row's elements lie row-major without gaps, shape (N,)."""
        return is_dense(self.strides, self.shape, self.itemsize)

    @property
    def aligned(self) -> Mask:
        """Whether base and strides are whole elements, shape (N,)."""
        uneven = (self.strides % self.itemsize[:, None] != 0) & (self.shape > 1)
        return np.asarray((self.base % self.itemsize == 0) & ~uneven.any(axis=1))

    def check(self, sizes: Sequence[int], side: str) -> None:
        """Check that every row lies inside its block; also for tables that a stranger sent.

        Args:
            sizes: Bytes of each block.
            side: `source` or `destination`, for the message.

        Raises:
            PlanError: A row is malformed or reaches outside; names the first and how many there are.
        """
        if not len(self):
            return
        known = (self.block >= 0) & (self.block < len(sizes)) & (self.dtype < len(DTYPES))
        sane = known & (self.base >= 0) & (self.strides >= 0).all(axis=1) & (self.shape >= 0).all(axis=1)
        limit = np.array([*sizes, 0], np.int64)[np.where(known, self.block, -1)]
        itemsize = np.array([*ITEMSIZES, 0], np.int64)[np.where(known, self.dtype.astype(np.int64), -1)]
        steps = np.maximum(self.shape - 1, 0)
        far = self.base + (steps.astype(np.float64) * self.strides).sum(axis=1) > _SAFE
        far |= self.shape.astype(np.float64).prod(axis=1) * 8 > _SAFE
        end = self.base + (steps * self.strides).sum(axis=1) + itemsize
        wrong = ~sane | far | ((end > limit) & (self.shape > 0).all(axis=1))
        if wrong.any():
            raise PlanError(self._complaint(int(np.flatnonzero(wrong)[0]), int(wrong.sum()), sizes, side))

    def _complaint(self, row: int, count: int, sizes: Sequence[int], side: str) -> str:
        block = int(self.block[row])
        size = f"{sizes[block]} bytes" if 0 <= block < len(sizes) else "not there"
        return (
            f"{side} of copy {row} is outside its memory ({count} such copies): block {block} ({size}), base "
            f"{self.base[row]}, strides {self.strides[row].tolist()}, shape {self.shape[row].tolist()}, "
            f"dtype {self.dtype[row]}; plan again"
        )


def packed_bases(num_bytes: I64) -> I64:
    """Return where each row begins when rows follow each other without gaps, shape (N,)."""
    return np.cumsum(num_bytes) - num_bytes


def cut_rows(copies: CopyTable, max_bytes: int, where: Mask | None = None) -> CopyTable:
    """Cut rows (those of `where`) of more than `max_bytes` along their outermost dims, in element order."""
    limit = np.full(len(copies), max_bytes, np.int64)
    if where is not None:
        limit[~where] = np.iinfo(np.int64).max
    for dim in range(copies.shape.shape[1]):
        total = copies.num_elements * ITEMSIZES[copies.src_dtype]
        if not (total > limit).any():
            break
        extent = np.maximum(copies.shape[:, dim], 1)
        step = np.where(total > limit, np.clip(limit // np.maximum(total // extent, 1), 1, extent), extent)
        parts = -(-extent // step)
        copies, limit = _cut_dim(copies, dim, step, parts), np.repeat(limit, parts)
    return copies


def _cut_dim(copies: CopyTable, dim: int, step: I64, parts: I64) -> CopyTable:
    extent = copies.shape[:, dim]
    rows = np.repeat(np.arange(len(copies)), parts)
    part = np.arange(len(rows)) - np.repeat(packed_bases(parts), parts)
    begin = part * step[rows]
    cut = copies.take(rows)
    shape = cut.shape.copy()
    shape[:, dim] = np.minimum(step[rows], extent[rows] - begin)
    return CopyTable(
        cut.src_block,
        cut.src_base + begin * cut.src_strides[:, dim],
        cut.src_strides,
        cut.dst_block,
        cut.dst_base + begin * cut.dst_strides[:, dim],
        cut.dst_strides,
        shape,
        cut.src_dtype,
        cut.dst_dtype,
    )


def batches(
    direct: Mask, num_bytes: I64, max_bytes: int, max_rows: int = 512
) -> Iterator[tuple[bool, slice]]:
    """Group consecutive rows of equal kind: `direct` ones by number, the others by bytes as well."""
    kinds, sizes = direct.tolist(), num_bytes.tolist()
    begin, filled = 0, 0
    for row, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
        full = row - begin >= max_rows or (not kind and filled + size > max_bytes)
        if row > begin and (kind != kinds[begin] or full):
            yield kinds[begin], slice(begin, row)
            begin, filled = row, 0
        filled += size
    if kinds:
        yield kinds[begin], slice(begin, len(kinds))


def joined_spans(block: I32, base: I64, num_bytes: I64) -> list[tuple[int, int, int]]:
    """Return `(block, begin, end)` of dense rows in order, neighbours in memory joined."""
    if not len(block):
        return []
    follows = (block[1:] == block[:-1]) & (base[1:] == base[:-1] + num_bytes[:-1])
    first = np.flatnonzero(np.concatenate(([True], ~follows)))
    last = np.concatenate((first[1:], [len(block)])) - 1
    ends = base[last] + num_bytes[last]
    return list(zip(block[first].tolist(), base[first].tolist(), ends.tolist(), strict=True))
