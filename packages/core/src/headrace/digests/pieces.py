"""Rows of a digest table as matrices of words: which can be read in place, and how the others are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from headrace.plan import DigestTable
from headrace.types import DTYPES, I64, ITEMSIZES

FOLD_BYTES = 1 << 16


def block_offsets(blocks: Sequence[torch.Tensor]) -> I64:
    """Return where each block's first element lies in its storage, bytes: int64 of shape (len(blocks),)."""
    return np.array([block.storage_offset() * block.element_size() for block in blocks], np.int64)


@dataclass(frozen=True)
class MatrixRows:
    """A digest table seen as matrices; columns are lists, because one Python loop walks them.

    Where `simple` holds, row `i` is `count` matrix rows of `words` whole words, `pitch` words apart, from
    word `start` of the block's storage; its first matrix row and word are `row` and `word`, its rows
    `row_step` apart. `begin` is where the first element lies in the storage, bytes.
    """

    table: DigestTable
    num_bytes: I64
    begin: list[int]
    simple: list[bool]
    block: list[int]
    start: list[int]
    count: list[int]
    words: list[int]
    pitch: list[int]
    row: list[int]
    row_step: list[int]
    word: list[int]

    @classmethod
    def of(cls, table: DigestTable, blocks: Sequence[torch.Tensor]) -> MatrixRows:
        """Classify all rows of `table` at once."""
        size = ITEMSIZES[table.dst_dtype]
        leading = _leading(table)
        lead, steps = np.where(leading, table.shape, 1), _row_steps(table, leading)
        extent, offset, stride = _last(table)
        length, column = extent * size, offset * size
        begin = table.base + block_offsets(blocks)[table.block]
        axis = (lead > 1).argmax(axis=1)[:, None]
        count, pitch, step = (np.take_along_axis(c, axis, 1)[:, 0] for c in (lead, table.strides, steps))
        simple = (table.src_dtype == table.dst_dtype) & ((lead > 1).sum(axis=1) <= 1) & (lead > 0).all(axis=1)
        simple &= ((stride == size) | (length == size)) & (length > 0)
        simple &= (length % 8 == 0) & (column % 8 == 0) & (begin % 8 == 0)
        simple &= (pitch % 8 == 0) | (count == 1)
        simple &= (table.ndim != 1) | (table.extents[:, 0] * size <= FOLD_BYTES)
        row = (np.where(leading, table.offsets, 0) * steps).sum(axis=1)
        words = (begin // 8, count, length // 8, pitch // 8, row, np.maximum(step, 1), column // 8)
        columns = [c.tolist() for c in (begin, simple, table.block, *words)]
        return cls(table, table.shape.prod(axis=1) * size, *columns)


def _leading(table: DigestTable) -> npt.NDArray[np.bool_]:
    """Return which dims are neither the last one nor padding, shape (N, D)."""
    dims = np.arange(table.shape.shape[1])
    return np.asarray(dims < table.ndim.astype(np.int64)[:, None] - 1)


def _row_steps(table: DigestTable, leading: npt.NDArray[np.bool_]) -> I64:
    """Return how many matrix rows one step in a leading dim is, shape (N, D)."""
    extents = np.where(leading, table.extents, 1)
    steps = np.ones_like(extents)
    steps[:, :-1] = np.cumprod(extents[:, :0:-1], axis=1)[:, ::-1]
    return steps


def _last(table: DigestTable) -> tuple[I64, I64, I64]:
    """Return extent, offset and stride of each row's last dim, shape (N,) each."""
    last = np.maximum(table.ndim.astype(np.int64) - 1, 0)[:, None]
    extent, offset, stride = (
        np.take_along_axis(column, last, axis=1)[:, 0]
        for column in (table.shape, table.offsets, table.strides)
    )
    return extent, offset, stride


@dataclass(frozen=True, slots=True)
class Lead:
    """One leading dim of a piece: extent, bytes per step in memory, matrix rows per step."""

    extent: int
    stride: int
    row_step: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A box in matrix form: its leading dims, then `length` elements from element `column` of the matrix row.

    Attributes:
        leads: Leading dims with more than one step, outermost first.
        row: First matrix row.
        column: First element in the matrix row.
        length: Elements in the matrix row.
        start: Byte of the first element in the block's storage.
        stride: Bytes between elements of the last dim.
    """

    leads: tuple[Lead, ...]
    row: int
    column: int
    length: int
    start: int
    stride: int

    def split(self, limit: int, align: int) -> Iterator[Piece]:
        """Yield pieces of about `limit` elements; the last dim is cut at multiples of `align` elements."""
        if prod(lead.extent for lead in self.leads) * self.length <= limit:
            yield self
            return
        if not self.leads:
            yield from self._split_columns(max(align, limit // align * align))
            return
        outer = self.leads[0]
        inner = prod(lead.extent for lead in self.leads[1:]) * self.length
        step = max(1, limit // inner)
        for begin in range(0, outer.extent, step):
            yield from self._part(begin, min(step, outer.extent - begin)).split(limit, align)

    def _part(self, begin: int, extent: int) -> Piece:
        outer, *rest = self.leads
        lead = [replace(outer, extent=extent)] if extent > 1 else []
        start, row = self.start + begin * outer.stride, self.row + begin * outer.row_step
        return replace(self, leads=(*lead, *rest), row=row, start=start)

    def _split_columns(self, step: int) -> Iterator[Piece]:
        begin, end = self.column, self.column + self.length
        for low in range(begin // step * step, end, step):
            first, last = max(low, begin), min(low + step, end)
            start = self.start + (first - begin) * self.stride
            yield replace(self, column=first, length=last - first, start=start)

    def walk(self) -> Iterator[Piece]:
        """Yield the piece at every step of all leading dims but the innermost."""
        if len(self.leads) <= 1:
            yield self
            return
        for begin in range(self.leads[0].extent):
            yield from self._part(begin, 1).walk()

    def in_words(self, size: int) -> bool:
        """Return whether it can be read as whole words where it lies; `size` is the element's."""
        dense = self.stride == size or self.length == 1
        numbers = (self.start, self.length * size, self.column * size, *(lead.stride for lead in self.leads))
        return dense and all(number % 8 == 0 for number in numbers)


def pieces_of(table: DigestTable, i: int, begin: int) -> Iterator[Piece]:
    """Yield row `i` of the table, whose first element is at byte `begin` of its storage, in matrix form."""
    rank = int(table.ndim[i])
    shape, strides, offsets, extents = (
        c[i, : max(rank, 1)].tolist() for c in (table.shape, table.strides, table.offsets, table.extents)
    )
    leads: list[Lead] = []
    row, step = 0, 1
    for dim in range(rank - 2, -1, -1):
        row += offsets[dim] * step
        if shape[dim] > 1:
            leads = _merged(Lead(shape[dim], strides[dim], step), leads)
        step *= extents[dim]
    whole = Piece(tuple(leads), row, offsets[-1] if rank else 0, shape[-1], begin, strides[-1])
    size = DTYPES[int(table.dst_dtype[i])].itemsize
    if rank == 1 and extents[0] * size > FOLD_BYTES:
        yield from _folded(whole, FOLD_BYTES // size)
    else:
        yield whole


def _merged(outer: Lead, leads: list[Lead]) -> list[Lead]:
    """Put `outer` before `leads`; as one dim where memory and matrix both go on evenly."""
    if leads:
        inner = leads[0]
        even = (inner.stride * inner.extent, inner.row_step * inner.extent)
        if (outer.stride, outer.row_step) == even:
            return [Lead(outer.extent * inner.extent, inner.stride, inner.row_step), *leads[1:]]
    return [outer, *leads]


def _folded(piece: Piece, fold: int) -> Iterator[Piece]:
    """Yield a box of one dim as rows of `fold` elements: the end of a row, whole rows, the begin of a row."""
    begin, end = piece.column, piece.column + piece.length
    first, last = -(-begin // fold), end // fold
    if first > last:
        yield _fold_part(piece, begin, 1, end - begin, fold)
        return
    if begin % fold:
        yield _fold_part(piece, begin, 1, first * fold - begin, fold)
    if last > first:
        yield _fold_part(piece, first * fold, last - first, fold, fold)
    if end % fold:
        yield _fold_part(piece, last * fold, 1, end % fold, fold)


def _fold_part(piece: Piece, low: int, count: int, length: int, fold: int) -> Piece:
    start = piece.start + (low - piece.column) * piece.stride
    leads = (Lead(count, fold * piece.stride, 1),) if count > 1 else ()
    return Piece(leads, low // fold, low % fold, length, start, piece.stride)
