"""What Mooncake is asked for: copies as few long ranges, cut into batches that fit a staging slot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from headrace.geometry import dense_strides
from headrace.plan import CopyTable
from headrace.transports.rows import Rows, cut_rows
from headrace.types import I64

MERGE_GAP_BYTES = 4096
WORTH_A_RANGE_BYTES = 1024
MOST_WASTE = 4


@dataclass(frozen=True)
class StagedReads:
    """One batch: ranges to read into a slot, and the copies out of it.

    Attributes:
        ranges: `(segment, byte in the segment, byte in the slot, bytes)`, shape (R, 4).
        copies: Sources are block 0, the slot.
    """

    ranges: I64
    copies: CopyTable


def staged_reads(copies: CopyTable, slot_bytes: int) -> Iterator[StagedReads]:
    """Yield batches of copies whose sources fit into a slot; neighbours in memory are read as one range.

    A row with gaps is read whole where that is not much more than its elements, and run by run otherwise.
    """
    copies = cut_rows(copies, slot_bytes)
    copies = copies.take(np.lexsort((copies.src_base, copies.src_block)))
    rows = Rows.sources(copies)
    run_bytes, span = _run_bytes(rows), _spans(rows)
    whole = (span <= slot_bytes) & ((span <= MOST_WASTE * rows.num_bytes) | (run_bytes < WORTH_A_RANGE_BYTES))
    batch = _Batch(slot_bytes)
    for row in range(len(rows)):
        size = int(span[row]) if whole[row] else int(rows.num_bytes[row])
        if not batch.fits(rows, row, size, whole=bool(whole[row])):
            yield batch.done(copies)
            batch = _Batch(slot_bytes)
        if whole[row]:
            batch.add_whole(rows, row, size)
        else:
            batch.add_runs(rows, row, int(run_bytes[row]))
    if len(rows):
        yield batch.done(copies)


def _spans(rows: Rows) -> I64:
    """Return the bytes from each row's first to its last, shape (N,)."""
    return np.asarray((np.maximum(rows.shape - 1, 0) * rows.strides).sum(axis=1) + rows.itemsize)


def _run_bytes(rows: Rows) -> I64:
    """Return the bytes that lie together at the end of each row's dims, shape (N,)."""
    run = rows.itemsize.astype(np.int64).copy()
    going = np.ones(len(rows), np.bool_)
    for dim in range(rows.shape.shape[1] - 1, -1, -1):
        flat = (rows.strides[:, dim] == run) | (rows.shape[:, dim] <= 1)
        going &= flat
        run = np.where(going, run * rows.shape[:, dim], run)
    return run


class _Batch:
    """Ranges and copies of one slot while they are collected; rows come in the order of their memory."""

    def __init__(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._used = 0
        self._ranges: list[list[int]] = []
        self._rows: list[int] = []
        self._bases: list[int] = []
        self._packed: list[bool] = []

    def fits(self, rows: Rows, row: int, size: int, *, whole: bool) -> bool:
        """Return whether the next row has room."""
        return self._used + self._growth(rows, row, size, whole=whole) <= self._slot_bytes

    def _growth(self, rows: Rows, row: int, size: int, *, whole: bool) -> int:
        """Return the bytes that a row adds: fewer where it goes on in, or close behind, the last range."""
        if not whole or not self._ranges:
            return size
        segment, begin, _, length = self._ranges[-1]
        base = int(rows.base[row])
        if segment != int(rows.block[row]) or not begin <= base <= begin + length + MERGE_GAP_BYTES:
            return size
        return max(base + size - begin - length, 0)

    def add_whole(self, rows: Rows, row: int, size: int) -> None:
        """Read a row from its first byte to its last; its strides stay."""
        base, grown = int(rows.base[row]), self._growth(rows, row, size, whole=True)
        if grown != size or (self._ranges and self._is_next(rows, row)):
            last = self._ranges[-1]
            last[3] += grown
        else:
            last = [int(rows.block[row]), base, self._used, size]
            self._ranges.append(last)
        self._used += grown
        self._note(row, last[2] + base - last[1], packed=False)

    def _is_next(self, rows: Rows, row: int) -> bool:
        segment, begin, _, length = self._ranges[-1]
        return segment == int(rows.block[row]) and begin + length == int(rows.base[row])

    def add_runs(self, rows: Rows, row: int, run_bytes: int) -> None:
        """Read a row run by run, packed."""
        starts = _run_starts(rows, row, run_bytes)
        self._note(row, self._used, packed=True)
        for number, start in enumerate(starts.tolist()):
            self._ranges.append([int(rows.block[row]), start, self._used + number * run_bytes, run_bytes])
        self._used += len(starts) * run_bytes
        # A range that a whole row may grow must be the last in the slot as well: runs end it.
        self._ranges.append([-1, 0, self._used, 0])

    def _note(self, row: int, base: int, *, packed: bool) -> None:
        self._rows.append(row)
        self._bases.append(base)
        self._packed.append(packed)

    def done(self, copies: CopyTable) -> StagedReads:
        """Return the batch."""
        mine = copies.take(np.array(self._rows, np.int64))
        sources = Rows.sources(mine)
        packed = np.array(self._packed, np.bool_)[:, None]
        strides = np.where(packed, dense_strides(sources.shape, sources.itemsize), sources.strides)
        ranges = np.array([one for one in self._ranges if one[0] >= 0], np.int64).reshape(-1, 4)
        return StagedReads(
            ranges,
            replace(
                mine,
                src_block=np.zeros(len(mine), np.int32),
                src_base=np.array(self._bases, np.int64),
                src_strides=strides,
            ),
        )


def _run_starts(rows: Rows, row: int, run_bytes: int) -> I64:
    """Return the first byte of every run of a row, row-major."""
    starts = np.array([int(rows.base[row])], np.int64)
    left = int(rows.num_bytes[row]) // run_bytes
    for extent, stride in zip(rows.shape[row].tolist(), rows.strides[row].tolist(), strict=True):
        if len(starts) >= left:
            break
        starts = (starts[:, None] + np.arange(extent, dtype=np.int64) * stride).reshape(-1)
    return starts
