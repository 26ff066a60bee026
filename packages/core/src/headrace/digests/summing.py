"""Sums over the rows of a digest table with torch, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from headrace.digests.factors import factors
from headrace.digests.pieces import Lead, MatrixRows, Piece, pieces_of
from headrace.types import DTYPES, U64

_COPY_ELEMENTS = 1 << 18
_DEVICE_WORDS = 1 << 24
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TORCH: list[torch.dtype] = [getattr(torch, dtype.name) for dtype in DTYPES]
_ONE_ROW = Lead(1, 0, 1)


class Summer:
    """Sums rows of one table; one per thread."""

    def __init__(self, rows: MatrixRows, blocks: Sequence[torch.Tensor]) -> None:
        self._rows = rows
        self._blocks = blocks
        self._flat: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._factors: dict[tuple[object, ...], torch.Tensor] = {}

    def run(self, part: Sequence[int]) -> U64:
        """Return the digests of the rows in `part`: uint64 of shape (len(part),)."""
        found: dict[torch.device, tuple[list[int], list[torch.Tensor]]] = {}
        for position, i in enumerate(part):
            device = self._blocks[self._rows.block[i]].device
            positions, values = found.setdefault(device, ([], []))
            for value in self._sums(i):
                positions.append(position)
                values.append(value)
        out = np.zeros(len(part), np.int64)
        for positions, values in found.values():
            if values:
                np.add.at(out, positions, torch.stack(values).cpu().numpy())
        return out.view(np.uint64)

    def _sums(self, i: int) -> Iterator[torch.Tensor] | tuple[torch.Tensor]:
        return (self._simple(i),) if self._rows.simple[i] else self._pieces(i)

    def _simple(self, i: int) -> torch.Tensor:
        rows = self._rows
        shape = (rows.count[i], rows.words[i])
        flat = self._typed(rows.block[i], torch.int64)
        matrix = torch.as_strided(flat, shape, (rows.pitch[i], 1), rows.start[i])
        return self._sum(matrix, self._row_factors(matrix, rows.row[i], rows.row_step[i]), rows.word[i])

    def _pieces(self, i: int) -> Iterator[torch.Tensor]:
        table = self._rows.table
        if not table.shape[i].all():
            return
        src, dst = int(table.src_dtype[i]), int(table.dst_dtype[i])
        for piece in pieces_of(table, i, self._rows.begin[i]):
            if src == dst and piece.in_words(DTYPES[dst].itemsize):
                for part in piece.walk():
                    yield self._whole_words(part, self._rows.block[i], DTYPES[dst].itemsize)
            else:
                for part in piece.split(_COPY_ELEMENTS, align=8):
                    yield self._copied(part, self._rows.block[i], src, dst)

    def _whole_words(self, piece: Piece, block: int, size: int) -> torch.Tensor:
        lead = piece.leads[0] if piece.leads else _ONE_ROW
        shape = (lead.extent, piece.length * size // 8)
        flat = self._typed(block, torch.int64)
        matrix = torch.as_strided(flat, shape, (lead.stride // 8, 1), piece.start // 8)
        return self._sum(
            matrix, self._row_factors(matrix, piece.row, lead.row_step), piece.column * size // 8
        )

    def _copied(self, piece: Piece, block: int, src: int, dst: int) -> torch.Tensor:
        """Sum a piece that is strided, cast or not of whole words: through a dense copy padded with zeros."""
        size = DTYPES[dst].itemsize
        per_word = 8 // size
        shape = [lead.extent for lead in piece.leads]
        front = piece.column % per_word
        padded = -(-(front + piece.length) // per_word) * per_word
        source = self._view(piece, block, src, raw=src == dst)
        kind = _RAW[size] if src == dst else _TORCH[dst]
        make = torch.empty if padded == piece.length else torch.zeros
        dense = make((*shape, padded * size), dtype=torch.uint8, device=source.device)
        dense.view(kind)[..., front : front + piece.length].copy_(source)
        matrix = dense.view(torch.int64).view(-1, padded // per_word)
        steps = [lead.row_step for lead in piece.leads]
        last = piece.row + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        table = factors(matrix.device)[0].first(last + 1)
        rows = torch.as_strided(table, shape, steps, piece.row).reshape(-1)
        return self._sum(matrix, rows, piece.column // per_word)

    def _view(self, piece: Piece, block: int, src: int, *, raw: bool) -> torch.Tensor:
        """Return the piece's elements as a tensor; odd addresses go through a copy of their bytes."""
        size = DTYPES[src].itemsize
        kind = _RAW[size] if raw else _TORCH[src]
        shape = (*(lead.extent for lead in piece.leads), piece.length)
        strides = (*(lead.stride for lead in piece.leads), piece.stride)
        if piece.start % size == 0 and all(stride % size == 0 for stride in strides):
            steps = [stride // size for stride in strides]
            return torch.as_strided(self._typed(block, kind), shape, steps, piece.start // size)
        flat = self._typed(block, torch.uint8)
        loose = torch.as_strided(flat, (*shape, size), (*strides, 1), piece.start)
        return loose.clone(memory_format=torch.contiguous_format).view(kind)[..., 0]

    def _sum(self, matrix: torch.Tensor, rows: torch.Tensor, word: int) -> torch.Tensor:
        words = matrix.shape[1]
        key = (word, words, matrix.device)
        columns = self._factors.get(key)
        if columns is None:
            columns = factors(matrix.device)[1].first(word + words)[word : word + words]
            self._factors[key] = columns
        if matrix.device.type != "cpu":
            return _device_sum(matrix, rows, columns)
        if words == 1:
            return torch.dot(matrix[:, 0], rows) * columns[0]
        return torch.dot(_row_sums(matrix, columns), rows)

    def _row_factors(self, matrix: torch.Tensor, row: int, step: int) -> torch.Tensor:
        count = matrix.shape[0]
        key = (row, count, step, matrix.device)
        rows = self._factors.get(key)
        if rows is None:
            table = factors(matrix.device)[0].first(row + (count - 1) * step + 1)
            rows = torch.as_strided(table, (count,), (step,), row)
            self._factors[key] = rows
        return rows

    def _typed(self, block: int, kind: torch.dtype) -> torch.Tensor:
        """Return the block's whole storage as a flat tensor of `kind`."""
        flat = self._flat.get((block, kind))
        if flat is None:
            storage = self._blocks[block].untyped_storage()
            flat = torch.empty(0, dtype=kind, device=storage.device)
            flat.set_(storage, 0, (storage.nbytes() // kind.itemsize,), (1,))
            self._flat[block, kind] = flat
        return flat


def _row_sums(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the matrix's product with a vector; numpy's takes half the time of torch's for such integers."""
    return torch.from_numpy(np.einsum("ij,j->i", matrix.numpy(), columns.numpy()))


def _device_sum(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Sum on an accelerator, where torch has no integer matrix product, in bounded temporary memory."""
    step = max(1, _DEVICE_WORDS // matrix.shape[1])
    parts = [
        ((matrix[begin : begin + step] * columns).sum(dim=1) * rows[begin : begin + step]).sum()
        for begin in range(0, matrix.shape[0], step)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
