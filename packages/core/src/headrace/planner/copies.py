"""From pairs of placed boxes to copy tables: few, long copies in memory order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from headrace.geometry import RegionTable
from headrace.plan import CopyTable
from headrace.planner.join import Mask, all_dims, volumes
from headrace.types import I64, ITEMSIZES, U8

_OUTERMOST = np.iinfo(np.int64).max


def make_copies(src: RegionTable, dst: RegionTable, src_dtype: U8, dst_dtype: U8) -> CopyTable:
    """Return one coalesced copy per row; `src` and `dst` place the same boxes row by row."""
    shape, src_strides, dst_strides = _coalesce(src.shape, src.strides, dst.strides)
    single = shape[:, -1] == 1
    src_strides[single, -1] = ITEMSIZES[src_dtype[single]]
    dst_strides[single, -1] = ITEMSIZES[dst_dtype[single]]
    return CopyTable(
        src.block, src.base, src_strides, dst.block, dst.base, dst_strides, shape, src_dtype, dst_dtype
    )


def finish(table: CopyTable, bucket: I64, num_buckets: int) -> tuple[CopyTable, I64]:
    """Sort copies by (bucket, destination), merge adjacent ones in a bucket; return bucket bounds too."""
    keys = (table.dst_base, table.dst_block, bucket)
    if not _is_sorted(keys):
        order = np.lexsort(keys)
        table, bucket = table.take(order), bucket[order]
    table, kept = _merge_rows(table, bucket)
    return table, np.searchsorted(bucket[kept], np.arange(num_buckets + 1)).astype(np.int64)


def split_by_bytes(table: CopyTable, limit_bytes: int) -> tuple[CopyTable, I64, I64]:
    """Sort by destination, merge, and cut the table into buckets of about `limit_bytes`, never inside a copy.

    Returns:
        The copies, the bucket bounds, and the source bytes of each bucket.
    """
    table, _ = finish(table, np.zeros(len(table), np.int64), 1)
    num_bytes = volumes(table.shape) * ITEMSIZES[table.src_dtype]
    number = (np.cumsum(num_bytes) - num_bytes) // limit_bytes
    bounds = np.append(np.flatnonzero(np.diff(number, prepend=-1)), len(table)).astype(np.int64)
    sums = np.add.reduceat(num_bytes, bounds[:-1]) if len(table) else np.zeros(0, np.int64)
    return table, bounds, sums


def _is_sorted(keys: tuple[np.ndarray, ...]) -> bool:
    """Return whether rows ascend by the last key, then the one before it, and so on."""
    tied = np.ones(max(len(keys[0]) - 1, 0), np.bool_)
    for key in reversed(keys):
        if (tied & (key[1:] < key[:-1])).any():
            return False
        tied &= key[1:] == key[:-1]
    return True


def _coalesce(shape: I64, src: I64, dst: I64) -> tuple[I64, I64, I64]:
    """Order dims by destination stride, merge those that run on at both ends, drop the padding."""
    one = shape == 1
    shape, src, dst = shape.copy(), np.where(one, 0, src), np.where(one, 0, dst)
    rank = np.where(one, _OUTERMOST, dst)
    if (rank[:, :-1] < rank[:, 1:]).any():
        shape, src, dst = _reordered(np.argsort(-rank, axis=1, kind="stable"), shape, src, dst)
    for dim in range(shape.shape[1] - 2, -1, -1):
        _merge_dim(shape, src, dst, dim)
    real = shape > 1
    if (real[:, :-1] & ~real[:, 1:]).any():
        shape, src, dst = _reordered(np.argsort(real, axis=1, kind="stable"), shape, src, dst)
    used = np.flatnonzero((shape > 1).any(axis=0))
    first = int(used[0]) if len(used) else shape.shape[1] - 1
    return tuple(np.ascontiguousarray(a[:, first:]) for a in (shape, src, dst))  # type: ignore[return-value]


def _merge_dim(shape: I64, src: I64, dst: I64, dim: int) -> None:
    """Pull dim + 1 into dim, in place, where dim steps over exactly what dim + 1 spans."""
    inner = dim + 1
    runs_on = (dst[:, dim] == dst[:, inner] * shape[:, inner]) & (
        src[:, dim] == src[:, inner] * shape[:, inner]
    )
    rows = np.flatnonzero(runs_on & (shape[:, dim] > 1))
    shape[rows, dim] *= shape[rows, inner]
    shape[rows, inner] = 1
    for strides in (src, dst):
        strides[rows, dim] = strides[rows, inner]
        strides[rows, inner] = 0


def _reordered(order: np.ndarray, *columns: I64) -> tuple[I64, ...]:
    return tuple(np.take_along_axis(column, order, axis=1) for column in columns)


def _merge_rows(table: CopyTable, bucket: I64) -> tuple[CopyTable, I64]:
    """Merge each copy with the next one where that goes on at both ends; return the rows that stay, too."""
    rows = np.arange(len(table))
    if len(table) < 2:
        return table, rows
    outer = np.where(
        (table.shape > 1).any(axis=1), np.argmax(table.shape > 1, axis=1), table.shape.shape[1] - 1
    )
    extent = table.shape[rows, outer]
    inner = table.shape.copy()
    inner[rows, outer] = 1
    same = _goes_on(table.src_base, extent * table.src_strides[rows, outer])
    same &= _goes_on(table.dst_base, extent * table.dst_strides[rows, outer])
    for column in (bucket, outer, table.src_block, table.dst_block, table.src_dtype, table.dst_dtype):
        same &= column[1:] == column[:-1]
    for wide in (inner, table.src_strides, table.dst_strides):
        same &= all_dims(wide[1:] == wide[:-1])
    kept = np.flatnonzero(np.append(True, ~same))
    if len(kept) == len(table):
        return table, rows
    merged = table.take(kept)
    shape = merged.shape.copy()
    shape[np.arange(len(kept)), outer[kept]] = np.add.reduceat(extent, kept)
    return replace(merged, shape=shape), kept


def _goes_on(base: I64, span: I64) -> Mask:
    out: Mask = np.equal(base[1:], base[:-1] + span[:-1])
    return out
