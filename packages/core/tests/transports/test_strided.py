"""Blocks cut for copy engines: every byte stays, in its place, and no part passes a bound."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.testing.copies import CopyRow, table_of
from headrace.transports.strided import Blocks

pytestmark = pytest.mark.timeout(60)


def random_blocks(rng: np.random.Generator, count: int) -> Blocks:
    unit = np.repeat(rng.choice([1, 2, 4, 8], count)[:, None], 2, axis=1)
    run = rng.random(count) < 0.5
    width, rows = rng.integers(1, 60, count), np.where(run, 1, rng.integers(2, 40, count))
    zero = np.zeros(count, np.int64)
    steps = [
        np.stack([zero, np.where(run, 0, (width + rng.integers(0, 5, count)) * unit[:, 0])], axis=1)
        for _ in range(2)
    ]
    addresses = (rng.integers(0, 4000, count) * unit[:, 0] for _ in range(2))
    shape = np.stack([zero + 1, rows, width], axis=1)
    return Blocks(np.arange(count), *addresses, shape, *steps, unit)


def moved(blocks: Blocks) -> list[tuple[int, int, int]]:
    """Return (row, source, destination) of every byte."""
    out = []
    for i in range(len(blocks)):
        for row in range(int(blocks.shape[i, 1])):
            source = int(blocks.source[i] + row * blocks.source_steps[i, 1])
            destination = int(blocks.destination[i] + row * blocks.destination_steps[i, 1])
            out += [
                (int(blocks.row[i]), source + b, destination + b) for b in range(int(blocks.row_bytes[i]))
            ]
    return out


@pytest.mark.parametrize("piece_bytes", [512, 4096])
@pytest.mark.parametrize("seed", range(5))
def test_no_part_passes_a_bound(seed: int, piece_bytes: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = random_blocks(rng, 40)
    origins = rng.integers(0, 3, len(blocks)) * 8
    parts, crossing = blocks.cut_at(origins, piece_bytes)
    assert sorted(moved(parts) + moved(crossing)) == sorted(moved(blocks))
    assert (crossing.shape[:, 1] == 1).all()
    for i in range(len(parts)):
        begin = parts.source[i] - origins[parts.row[i]]
        end = begin + (parts.shape[i, 1] - 1) * parts.source_steps[i, 1] + parts.row_bytes[i] - 1
        assert begin // piece_bytes == end // piece_bytes


def test_nothing_is_cut_of_nothing() -> None:
    empty = random_blocks(np.random.default_rng(0), 0)
    parts, crossing = empty.cut_at(np.zeros(0, np.int64), 512)
    assert (len(parts), len(crossing)) == (0, 0)


def test_copies_are_counted_in_the_widest_units() -> None:
    rows = [
        CopyRow(shape=(3, 8), src_strides=(32, 2), dst_strides=(16, 2), src_base=16),
        CopyRow(shape=(3, 8), src_strides=(32, 2), dst_strides=(16, 2), src_base=2),
        CopyRow(shape=(5,), src_strides=(4,), dst_strides=(2,)),
        CopyRow(shape=(4, 8), src_strides=(16, 2), dst_strides=(32, 4), dst_dtype="float32"),
        CopyRow(shape=(2, 2, 2, 2), src_strides=(800, 80, 8, 2), dst_strides=(1600, 160, 16, 2)),
    ]
    table = table_of(rows)
    blocks, fits = Blocks.of(table, table.src_base, table.dst_base)
    assert fits.tolist() == [True, True, True, True, False]
    assert blocks.unit.tolist() == [[8, 8], [2, 2], [2, 2], [2, 4]]
    assert blocks.shape.tolist() == [[1, 3, 2], [1, 3, 8], [1, 5, 1], [1, 4, 8]]
    assert blocks.contiguous.tolist() == [False] * 4
