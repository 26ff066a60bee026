"""Sums of matrices that lie on a GPU: all of them in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from headrace.digests.factors import factors
from headrace.digests.pieces import MatrixRows
from headrace.types import I64, U64

TILE_ROWS, TILE_WORDS = 16, 128


def cuda_sums(rows: MatrixRows, chosen: I64, blocks: Sequence[torch.Tensor], device: torch.device) -> U64:
    """Return the digests of `chosen` simple rows, whose blocks lie on `device`: uint64 of shape (len(chosen),).

    Blocking; ordered after what the current stream has been given.
    """
    from headrace.digests.cuda_kernel import sum_matrices  # noqa: PLC0415 - only machines with a GPU have triton

    table, tile_matrix, last = _table(rows, chosen, blocks)
    with torch.cuda.device(device):
        row_factors, word_factors = (f.first(n) for f, n in zip(factors(device), last, strict=True))
        sums = torch.zeros(len(chosen), dtype=torch.int64, device=device)
        sum_matrices[(len(tile_matrix),)](
            torch.from_numpy(table).to(device), torch.from_numpy(tile_matrix).to(device), row_factors, word_factors,
            sums, ROWS=TILE_ROWS, WORDS=TILE_WORDS,
        )  # fmt: skip
        found: U64 = sums.cpu().numpy().view(np.uint64)
    return found


def _table(
    rows: MatrixRows, chosen: I64, blocks: Sequence[torch.Tensor]
) -> tuple[I64, npt.NDArray[np.int32], tuple[int, int]]:
    """Return the kernel's table, the matrix of each tile, and how many row and word factors it needs."""
    begins = np.array([block.untyped_storage().data_ptr() for block in blocks], np.int64)
    block, start, count, words, pitch, row, step, word = (
        np.array(column, np.int64)[chosen]
        for column in (
            rows.block,
            rows.start,
            rows.count,
            rows.words,
            rows.pitch,
            rows.row,
            rows.row_step,
            rows.word,
        )
    )
    tiles = -(-count // TILE_ROWS) * -(-words // TILE_WORDS)
    first = np.cumsum(tiles) - tiles
    columns = (begins[block] + 8 * start, count, words, pitch, row, step, word, first)
    tile_matrix = np.repeat(np.arange(len(chosen), dtype=np.int32), tiles)
    last = int((row + (count - 1) * step).max()) + 1, int((word + words).max())
    return np.ascontiguousarray(np.stack(columns, axis=1)), tile_matrix, last
