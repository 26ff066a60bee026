"""Rows of copy tables as blocks of bytes or elements at absolute addresses: what a kernel or a copy engine takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from headrace.plan import CopyTable
from headrace.types import I64, ITEMSIZES

Mask = np.ndarray
_LONGEST = 1 << 30
_WIDEST_UNIT = 8


@dataclass(frozen=True)
class Blocks:
    """N blocks of `shape` = (n0, n1, width) units; all arrays are int64.

    Attributes:
        row: Row of the copy table that the block is (a part of), shape (N,).
        source: Address of the first unit, shape (N,).
        destination: Likewise.
        shape: Extents, shape (N, 3).
        source_steps: Bytes per step of n0 and n1, shape (N, 2).
        destination_steps: Likewise.
        unit: Bytes of a unit; a source's and a destination's where they differ, shape (N, 2).
    """

    row: I64
    source: I64
    destination: I64
    shape: I64
    source_steps: I64
    destination_steps: I64
    unit: I64

    def __len__(self) -> int:
        return len(self.row)

    def take(self, rows: I64 | Mask | slice) -> Blocks:
        """Return the chosen blocks in that order."""
        return Blocks(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def num_units(self) -> I64:
        """Units per block, shape (N,)."""
        return np.asarray(self.shape.prod(axis=1))

    @property
    def contiguous(self) -> Mask:
        """Whether a block is one run of bytes, shape (N,)."""
        return np.asarray((self.shape[:, :2] == 1).all(axis=1))

    @property
    def num_bytes(self) -> I64:
        """Source bytes per block, shape (N,)."""
        return np.asarray(self.num_units * self.unit[:, 0])

    @property
    def row_bytes(self) -> I64:
        """Source bytes that lie side by side, shape (N,)."""
        return np.asarray(self.shape[:, 2] * self.unit[:, 0])

    @property
    def flat(self) -> Mask:
        """Whether a block has at most two dims, shape (N,)."""
        return np.asarray(self.shape[:, 0] == 1)

    @classmethod
    def of(cls, copies: CopyTable, sources: I64, destinations: I64) -> tuple[Blocks, Mask]:
        """Return a block per copy whose dims allow it, and a mask of those copies.

        Rows of equal dtypes become bytes in the widest units that fit; casts stay elements. Copies of more than three
        dims that do not merge are left out.

        Args:
            copies: The table.
            sources: Address of each copy's first element, shape (len(copies),).
            destinations: Likewise.
        """
        items = np.stack([ITEMSIZES[copies.src_dtype], ITEMSIZES[copies.dst_dtype]], axis=1)
        dense = (copies.src_strides[:, -1] == items[:, 0]) & (copies.dst_strides[:, -1] == items[:, 1])
        dense |= copies.shape[:, -1] == 1
        shape, source, destination = _widened(copies, dense)
        fits = (shape[:, :-3] == 1).all(axis=1) & (shape[:, -3:] <= _LONGEST).all(axis=1)
        blocks = cls(
            np.arange(len(copies)),
            sources,
            destinations,
            shape[:, -3:],
            source[:, -3:-1],
            destination[:, -3:-1],
            items,
        )
        exact = copies.src_dtype == copies.dst_dtype
        return blocks.take(fits)._in_widest_units(exact[fits]), fits

    def _in_widest_units(self, exact: Mask) -> Blocks:
        """Count blocks that are copied as they are in the widest unit that divides all their numbers."""
        real = self.shape[:, :2] > 1
        steps = np.where(real, self.source_steps | self.destination_steps, 0)
        width = self.shape[:, 2] * self.unit[:, 0]
        every = self.source | self.destination | width | steps[:, 0] | steps[:, 1]
        unit = np.minimum(every & -every, _WIDEST_UNIT)
        unit = np.where(exact, unit, self.unit[:, 0])
        shape = self.shape.copy()
        shape[:, 2] = np.where(exact, width // unit, shape[:, 2])
        units = np.where(exact[:, None], unit[:, None], self.unit)
        return Blocks(
            self.row, self.source, self.destination, shape, self.source_steps, self.destination_steps, units
        )

    def cut_at(self, origins: I64, piece_bytes: int) -> tuple[Blocks, Blocks]:
        """Cut blocks of two dims at most so that no part's source passes any `origins + k * piece_bytes`.

        Contiguous blocks are cut anywhere, others between rows.

        Returns:
            The parts, and single rows that cannot be cut and do pass one.
        """
        width = self.shape[:, 2] * self.unit[:, 0]
        run = self.contiguous
        pitch = np.where(run, self.unit[:, 0], self.source_steps[:, 1])
        count = np.where(run, self.shape[:, 2], self.shape[:, 1])
        row_bytes = np.where(run, self.unit[:, 0], width)
        lead = (self.source - origins) % piece_bytes
        parts = -(-(lead + (count - 1) * pitch + row_bytes) // piece_bytes)
        which = np.repeat(np.arange(len(self)), parts)
        turn = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
        low = np.maximum(-((lead[which] - turn * piece_bytes) // pitch[which]), 0)
        room = (turn + 1) * piece_bytes - lead[which] - row_bytes[which]
        high = np.minimum(room // pitch[which] + 1, count[which])
        whole = self._rows(which, low, high)
        last = np.append(which[1:] != which[:-1], True)[: len(which)]
        ends = np.where(last, count[which], np.append(low[1:], 0)[: len(which)])
        return whole.nonempty, self._rows(which, np.maximum(high, low), ends).nonempty

    @property
    def nonempty(self) -> Blocks:
        """The blocks that have units."""
        return self.take(self.num_units > 0)

    def _rows(self, which: I64, low: I64, high: I64) -> Blocks:
        """Return rows (of contiguous blocks: units) `[low, high)` of the chosen blocks."""
        chosen = self.take(which)
        run = chosen.contiguous
        size = np.maximum(high - low, 0)
        shape = chosen.shape.copy()
        shape[:, 1] = np.where(run, 1, size)
        shape[:, 2] = np.where(run, size, shape[:, 2])
        steps = [
            np.where(run, chosen.unit[:, side], pitch[:, 1])
            for side, pitch in enumerate((chosen.source_steps, chosen.destination_steps))
        ]
        return replace(
            chosen,
            source=chosen.source + low * steps[0],
            destination=chosen.destination + low * steps[1],
            shape=shape,
        )


def _widened(copies: CopyTable, dense: Mask) -> tuple[I64, I64, I64]:
    """Return shape and strides with at least three dims, the last one dense on both sides, the others' 1s in front."""
    count = len(copies)
    front = np.ones((count, 2), np.int64)
    outer = np.where(dense[:, None], _shifted(copies.shape, 1), copies.shape)
    shape = np.concatenate((front, outer, np.where(dense, copies.shape[:, -1], 1)[:, None]), axis=1)
    sides = []
    for strides in (copies.src_strides, copies.dst_strides):
        moved = np.where(dense[:, None], _shifted(strides, 0), strides)
        sides.append(np.concatenate((front * 0, moved, front[:, :1]), axis=1))
    real = shape > 1
    real[:, -1] = True
    order = np.argsort(real, axis=1, kind="stable")
    return tuple(np.take_along_axis(column, order, axis=1) for column in (shape, *sides))  # type: ignore[return-value]


def _shifted(columns: I64, fill: int) -> I64:
    """Return the columns moved one to the right, the last one dropped."""
    out = np.full_like(columns, fill)
    out[:, 1:] = columns[:, :-1]
    return out
