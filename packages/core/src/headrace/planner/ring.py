"""The ring between holder and receiver: how large, how deep, and what lies where in its slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.config import BUCKET_BYTES, MIB
from headrace.errors import CapacityError
from headrace.geometry import RegionTable, dense_strides
from headrace.plan import CopyTable, Ring, RingMode, buffered, staged_bytes
from headrace.planner.join import restrict, volumes
from headrace.types import I32, I64

ALIGN_BYTES = 64
LEAST_SLOT_BYTES = 4096
MOST_DEPTH = 4
DEVICE_BUCKET_BYTES = 256 * MIB


@dataclass(frozen=True)
class Packing:
    """Boxes laid out in buckets: row `i` lies at byte `offset[i]` of bucket `bucket[i]`.

    Attributes:
        bucket: Bucket of each row, shape (N,).
        offset: First byte in the bucket, shape (N,).
        owner: Owner of each bucket, shape (B,).
        num_bytes: Used bytes of each bucket, shape (B,).
    """

    bucket: I64
    offset: I64
    owner: I32
    num_bytes: I64


def choose_ring(
    total_bytes: int,
    budget_bytes: int,
    bucket_bytes: int,
    *,
    num_buckets: int | None = None,
    reserved_bytes: int = 0,
) -> Ring:
    """Choose how `total_bytes` pass through a budget: all at once, overlapped, or one slot at a time.

    Args:
        total_bytes: Bytes that pass through the ring.
        budget_bytes: Memory that staging may take.
        bucket_bytes: Wished size of one slot.
        num_buckets: Slots that hold everything; by default as many as `total_bytes` fills.
        reserved_bytes: Memory that is taken from the budget first (opaque buffers).

    Raises:
        CapacityError: Not even one slot fits; says how much is needed.
    """
    if not total_bytes:
        return Ring("none", 0, 0, "nothing passes through a ring")
    bucket_bytes = max(bucket_bytes // ALIGN_BYTES, 1) * ALIGN_BYTES
    room = budget_bytes - reserved_bytes
    wished = num_buckets or -(-total_bytes // bucket_bytes)
    if wished * bucket_bytes <= room:
        why = f"all {size(total_bytes)} fit into the {size(room)} that staging may take"
        return Ring("staged", bucket_bytes, wished, why)
    least = min(MIB, bucket_bytes)
    slot = bucket_bytes
    while slot > least and 2 * slot > room:
        slot = max(slot // 2 // ALIGN_BYTES * ALIGN_BYTES, least)
    short = f"{size(total_bytes)} do not fit into the {size(room)} that staging may take"
    if 2 * slot <= room:
        depth = min(MOST_DEPTH, room // slot)
        return Ring("overlapped", slot, depth, f"{short}: {depth} slots of {size(slot)} take turns")
    return _serial(room, bucket_bytes, short, reserved_bytes)


def device_bucket_bytes(asked_bytes: int, room_bytes: int) -> int:
    """Return the bucket size of a ring in GPU memory: what was asked for, else as large as `MOST_DEPTH` of them fit.

    A bucket costs the host some tenths of a millisecond; over PCIe 5 it should take several.
    """
    if asked_bytes != BUCKET_BYTES:
        return asked_bytes
    return max(asked_bytes, min(DEVICE_BUCKET_BYTES, room_bytes // MOST_DEPTH))


def mapped_ring(apply: CopyTable, room: int, *, on_gpu: bool) -> Ring:
    """Choose which copies from mapped memory go by way of a buffer that is filled before the pause.

    Args:
        apply: The copies.
        room: Memory that staging may take: of the receiver's GPU, or of its host.
        on_gpu: Whether the receiver's parameters lie on a GPU.
    """
    mode: RingMode = "device" if on_gpu else "gathered"
    where = "GPU memory" if on_gpu else "memory"
    needed = int(staged_bytes(apply.take(buffered(apply, mode))).sum())
    if not needed:
        return Ring("none", 0, 0, "copies go straight into live tensors")
    if needed <= room:
        why = f"{size(needed)} fit into the {size(room)} of {where} that staging may take"
        return Ring(mode, needed, 1, why)
    why = (
        f"copies go straight into live tensors: {size(needed)} do not fit into the {size(max(room, 0))} of {where} "
        "that staging may take"
    )
    return Ring("none", 0, 0, why)


def _serial(room: int, bucket_bytes: int, short: str, reserved_bytes: int) -> Ring:
    slot = min(room // LEAST_SLOT_BYTES * LEAST_SLOT_BYTES, bucket_bytes)
    if room < LEAST_SLOT_BYTES:
        needed = LEAST_SLOT_BYTES + reserved_bytes
        opaque = f" ({size(reserved_bytes)} of it for opaque buffers)" if reserved_bytes else ""
        raise CapacityError(
            f"staging may take {size(room + reserved_bytes)}, at least {size(needed)} are needed{opaque}; "
            "raise budget_bytes or free memory beside the engine",
            name="budget_bytes",
        )
    return Ring(
        "serial",
        slot,
        1,
        f"{short}, nor do two slots: one slot of {size(slot)} is filled and emptied in turn",
    )


def check_reserved(reserved_bytes: int, budget_bytes: int, who: str) -> None:
    """Refuse a budget that opaque buffers alone exceed.

    Raises:
        CapacityError: Says how much is needed.
    """
    if reserved_bytes > budget_bytes:
        raise CapacityError(
            f"{who}: tensors that go through the engine's own loader take {size(reserved_bytes)}, staging "
            f"may take {size(max(budget_bytes, 0))}; raise budget_bytes to at least {reserved_bytes}",
            name="budget_bytes",
        )


def cut(table: RegionTable, itemsize: I64, limit_bytes: int) -> tuple[RegionTable, I64]:
    """Cut boxes into pieces of at most `limit_bytes`: along dim 0, further dims where a row is too large.

    Returns:
        The pieces in the order of the boxes, and the row of the box that each piece comes from.
    """
    rows = np.arange(len(table))
    large = np.flatnonzero(volumes(table.shape) * itemsize > limit_bytes)
    if not len(large):
        return table, rows
    pieces, origin = _cut_all(table.take(large), itemsize[large], limit_bytes)
    small = np.delete(rows, large)
    rows = np.concatenate([small, large[origin]])
    order = np.argsort(rows, kind="stable")
    return RegionTable.concat([table.take(small), pieces]).take(order), rows[order]


def _cut_all(table: RegionTable, itemsize: I64, limit_bytes: int) -> tuple[RegionTable, I64]:
    inner = dense_strides(table.shape, itemsize)
    dim = np.argmax(inner <= limit_bytes, axis=1)[:, None]
    column = np.arange(table.ndim)[None, :]
    chunk = np.where(
        column > dim, table.shape, np.where(column == dim, np.maximum(limit_bytes // inner, 1), 1)
    )
    chunk = np.minimum(chunk, table.shape)
    steps = -(-table.shape // chunk)
    num = volumes(steps)
    rows = np.repeat(np.arange(len(table)), num)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(num) - num, num)
    index = number[:, None] // dense_strides(steps)[rows] % steps[rows]
    shift = index * chunk[rows]
    shape = np.minimum(chunk[rows], table.shape[rows] - shift)
    return restrict(table, rows, table.offsets[rows] + shift, shape), rows


def pack(owner: I32, num_bytes: I64, slot_bytes: int) -> Packing:
    """Lay rows out in buckets per owner, in order, each at a multiple of 64 bytes; owners take turns.

    Args:
        owner: Owner per row, ascending.
        num_bytes: Bytes per row, none above `slot_bytes`.
        slot_bytes: Size of a bucket, a multiple of 64.
    """
    padded = -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
    ends = np.cumsum(padded)
    starts, turns = _bucket_starts(owner, ends, slot_bytes)
    order = np.lexsort((owner[starts], turns)) if len(starts) else np.zeros(0, np.int64)
    number = np.empty(len(starts), np.int64)
    number[order] = np.arange(len(starts))
    rows_in = np.diff(np.append(starts, len(owner)))
    offset = ends - padded - np.repeat((ends - padded)[starts], rows_in)
    last = np.append(starts, len(owner))[1:] - 1
    used = offset[last] + num_bytes[last]
    return Packing(np.repeat(number, rows_in), offset, owner[starts][order].astype(np.int32), used[order])


def _bucket_starts(owner: I32, ends: I64, slot_bytes: int) -> tuple[I64, I64]:
    """Return the first row of each bucket and its turn, counted per owner."""
    starts: list[int] = []
    turns: list[int] = []
    owner_ends = np.append(np.flatnonzero(np.diff(owner)) + 1, len(owner))
    row = 0
    for owner_end in owner_ends.tolist() if len(owner) else ():
        turn = 0
        while row < owner_end:
            starts.append(row)
            turns.append(turn)
            begin = int(ends[row - 1]) if row else 0
            row = min(int(np.searchsorted(ends, begin + slot_bytes, side="right")), owner_end)
            turn += 1
    return np.array(starts, np.int64), np.array(turns, np.int64)


def slot_regions(pieces: RegionTable, packing: Packing, itemsize: I64) -> RegionTable:
    """Return the pieces as they lie in their slots: row-major; the slot of a row's bucket is block 0."""
    strides = dense_strides(pieces.shape, itemsize)
    slot = np.zeros(len(pieces), np.int32)
    return RegionTable(pieces.param, pieces.offsets, pieces.shape, slot, packing.offset, strides)


def size(num_bytes: int) -> str:
    """Return bytes as people read them: `512 bytes`, `1.5 MiB`."""
    if num_bytes < LEAST_SLOT_BYTES:
        return f"{num_bytes} bytes"
    value, unit = num_bytes / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"
