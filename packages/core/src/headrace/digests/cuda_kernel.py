"""One kernel that sums the matrices of a digest table on a GPU."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917 - kernels are no Python functions; their arguments have no types

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_matrices(
    matrices, tile_matrix, row_factors, word_factors, sums, ROWS: tl.constexpr, WORDS: tl.constexpr  # noqa: N803
):
    """Add one tile of `ROWS` times `WORDS` 64-bit words to the sum of its matrix, modulo 2^64.

    Columns of `matrices`: address, rows, words, bytes per row in words, first matrix row, matrix rows per row, first
    word, first tile.
    """
    tile = tl.program_id(0)
    number = tl.load(tile_matrix + tile).to(tl.int64)
    matrix = matrices + number * 8
    rows, words = tl.load(matrix + 1), tl.load(matrix + 2)
    across = (words + WORDS - 1) // WORDS
    turn = tile - tl.load(matrix + 7)
    row = (turn // across) * ROWS + tl.arange(0, ROWS)
    word = (turn % across) * WORDS + tl.arange(0, WORDS)
    in_rows, in_words = row < rows, word < words
    at = row[:, None] * tl.load(matrix + 3) + word[None, :]
    begin = tl.load(matrix).to(tl.pointer_type(tl.int64))
    found = tl.load(begin + at, mask=in_rows[:, None] & in_words[None, :], other=0)
    columns = tl.load(word_factors + tl.load(matrix + 6) + word, mask=in_words, other=0)
    leading = tl.load(row_factors + tl.load(matrix + 4) + row * tl.load(matrix + 5), mask=in_rows, other=0)
    total = tl.sum(tl.sum(found * columns[None, :], axis=1) * leading, axis=0)
    tl.atomic_add(sums + number, total, sem="relaxed")
