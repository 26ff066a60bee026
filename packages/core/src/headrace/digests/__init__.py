"""Digests of boxes: sums that holder and receiver make on their own, of any shard, and then compare.

A parameter's bytes (after the cast) are a matrix: its leading dims, raveled, are the rows; the bytes of its
last dim, padded with zeros to little-endian 64-bit words, are the columns. A parameter of one dim is one row,
or, where it is longer than `FOLD_BYTES`, rows of that length. A scalar is one row of one element. Then

    digest(box) = sum over rows r, words w of A(r) * B(w) * W(r, w)   modulo 2**64

where W is zero outside the box, and A, B are odd pseudo-random numbers (splitmix64 of the index). It is
additive over disjoint boxes. The factors are odd, so no single wrong bit stays unseen. It guards against
faults, not forgery: the top bits of words weigh only themselves, so two flips of bit 63 cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch

from headrace.digests.cuda import cuda_sums
from headrace.digests.pieces import FOLD_BYTES, MatrixRows, block_offsets
from headrace.digests.summing import Summer
from headrace.errors import PlanError
from headrace.plan import DigestTable
from headrace.types import I64, ITEMSIZES, U64

__all__ = ["FOLD_BYTES", "digest"]


def digest(
    table: DigestTable,
    blocks: Sequence[torch.Tensor],
    *,
    num_groups: int | None = None,
    num_threads: int = 1,
) -> U64:
    """Return one sum per group: uint64 of shape (num_groups,), 0 for a group without rows.

    Blocking; local; reads only. On a CPU about memory speed per thread, some 10 us per row besides.

    Args:
        table: What to sum up.
        blocks: Memory that `table.block` indexes. Bytes count from each tensor's first element and go through
            its storage, so both a flat uint8 segment and a live parameter of any shape will do.
        num_groups: Length of the result; by default the largest group plus one.
        num_threads: Threads that share the rows.

    Raises:
        PlanError: A row lies outside its block, parameter or group; nothing was read.
    """
    groups = int(table.group.max(initial=-1)) + 1 if num_groups is None else num_groups
    out = np.zeros(groups, np.uint64)
    if not len(table):
        return out
    _check_ids(table, len(blocks), groups)
    _check_bounds(table, blocks)
    rows = MatrixRows.of(table, blocks)
    sums = np.zeros(len(table), np.uint64)
    left = np.ones(len(table), np.bool_)
    for device in {block.device for block in blocks if block.is_cuda}:
        there = np.array([block.device == device for block in blocks])
        chosen = np.flatnonzero(np.array(rows.simple) & there[table.block])
        if len(chosen):
            sums[chosen] = cuda_sums(rows, chosen, blocks, device)
            left[chosen] = False
    _sum_others(rows, blocks, np.flatnonzero(left), num_threads, sums)
    np.add.at(out, table.group, sums)
    return out


def _sum_others(
    rows: MatrixRows, blocks: Sequence[torch.Tensor], chosen: I64, num_threads: int, sums: U64
) -> None:
    """Sum the chosen rows with torch, into `sums`, in threads."""
    parts = [chosen[part.start : part.stop].tolist() for part in _balanced(rows.num_bytes[chosen], num_threads)]
    if len(parts) == 1:
        found = [Summer(rows, blocks).run(parts[0])]
    else:
        with ThreadPoolExecutor(max(len(parts), 1), "headrace-digest") as pool:
            found = list(pool.map(lambda part: Summer(rows, blocks).run(part), parts))
    for part, values in zip(parts, found, strict=True):
        sums[part] = values


def _check_ids(table: DigestTable, num_blocks: int, num_groups: int) -> None:
    for what, ids, limit in (("group", table.group, num_groups), ("block", table.block, num_blocks)):
        if ids.min() < 0 or ids.max() >= limit:
            row = int(((ids < 0) | (ids >= limit)).argmax())
            message = f"digest row {row} names {what} {ids[row]}, there are {limit}; the plan does not fit"
            raise PlanError(message)


def _check_bounds(table: DigestTable, blocks: Sequence[torch.Tensor]) -> None:
    """Refuse rows that would read other memory: tables come from another process."""
    reach = (table.shape - 1) * table.strides
    begin = table.base + block_offsets(blocks)[table.block]
    end = begin + reach.sum(axis=1) + ITEMSIZES[table.src_dtype]
    size = np.array([block.untyped_storage().nbytes() for block in blocks], np.int64)[table.block]
    outside = (begin < 0) | (end > size) | ((table.strides < 0) & (table.shape > 1)).any(axis=1)
    real = np.arange(table.shape.shape[1]) < table.ndim[:, None]
    beyond = (table.offsets < 0) | (table.offsets + table.shape > table.extents)
    beyond = np.where(real, beyond, table.shape > 1)
    wrong = (table.shape > 0).all(axis=1) & (outside | beyond.any(axis=1))
    if wrong.any():
        row = int(wrong.argmax())
        raise PlanError(
            f"digest row {row} reads bytes [{begin[row]}, {end[row]}) of block {table.block[row]}, which has "
            f"{size[row]}, or a box outside its parameter; the plan does not fit what is held"
        )


def _balanced(num_bytes: I64, num_threads: int) -> list[range]:
    """Cut rows into ranges of about equal work."""
    if not len(num_bytes):
        return []
    ends = np.cumsum(num_bytes + 4096)
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, num_threads) // max(num_threads, 1))
    bounds = [0, *cuts.tolist(), len(num_bytes)]
    return [range(a, b) for a, b in pairwise(bounds) if b > a]
