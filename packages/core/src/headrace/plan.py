"""What moves: copy tables, buckets and the TransferPlan of one receiver."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Self

import numpy as np

from headrace.geometry import is_dense
from headrace.manifest import SegmentDescriptor
from headrace.types import I32, I64, ITEMSIZES, U8, dtype_code

STAGE_ALIGN_BYTES = 128

RingMode = Literal["none", "device", "gathered", "staged", "overlapped", "serial"]
MAPPED_MODES = frozenset({"none", "device", "gathered"})
"""Modes in which a receiver copies out of holders' memory that it maps: the plan has no buckets to fill."""


@dataclass(frozen=True)
class CopyTable:
    """Strided copies in columns: N copies of up to K dims, dims padded in front with extent 1 and stride 0.

    Copy `i` moves `shape[i]` elements from source block `src_block[i]`, byte `src_base[i]`, strides
    `src_strides[i]`, to the destination likewise, casting `src_dtype[i]` to `dst_dtype[i]` (codes of `DTYPES`)
    as torch's `copy_` does. Dims are ordered as the destination's memory is, outermost first, and merged where
    both sides allow it.
    """

    src_block: I32
    src_base: I64
    src_strides: I64
    dst_block: I32
    dst_base: I64
    dst_strides: I64
    shape: I64
    src_dtype: U8
    dst_dtype: U8

    @classmethod
    def empty(cls, ndim: int = 1) -> Self:
        """Return a table without rows."""
        i32, i64, wide, u8 = (
            np.zeros(0, np.int32),
            np.zeros(0, np.int64),
            np.zeros((0, ndim), np.int64),
            np.zeros(0, np.uint8),
        )
        return cls(i32, i64, wide, i32, i64, wide, wide, u8, u8)

    def __len__(self) -> int:
        return len(self.src_block)

    @property
    def num_elements(self) -> I64:
        """Elements per copy, shape (N,)."""
        counts: I64 = self.shape.prod(axis=1)
        return counts

    def take(self, rows: I64 | I32 | slice | np.ndarray) -> Self:
        """Return the selected rows (indices, mask or slice) in that order."""
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))


def buffered(copies: CopyTable, mode: RingMode) -> np.ndarray:
    """Return which copies from mapped memory go by way of a buffer that is filled before the pause, shape (N,).

    On a GPU all do. On a host those that gather a dense destination from scattered rows: strided copies run at about
    half the speed of dense ones there, at any length of row from 32 bytes to 8 KiB.
    """
    if mode != "gathered":
        return np.full(len(copies), mode == "device")
    scattered = ~is_dense(copies.src_strides, copies.shape, ITEMSIZES[copies.src_dtype])
    dense = is_dense(copies.dst_strides, copies.shape, ITEMSIZES[copies.dst_dtype])
    return np.asarray(scattered & dense & (copies.src_dtype == copies.dst_dtype))


def staged_bytes(copies: CopyTable) -> I64:
    """Return what each copy's source takes in a staging buffer, shape (N,): dense, rounded up to whole cache lines."""
    sizes: I64 = -(-copies.num_elements * ITEMSIZES[copies.src_dtype] // STAGE_ALIGN_BYTES) * STAGE_ALIGN_BYTES
    return sizes


@dataclass(frozen=True, slots=True)
class Ring:
    """How bytes pass through memory between holder and live parameters.

    Attributes:
        mode: `none`: no buffer, copies go straight into live parameters; `device`: the same copies, by way of a
            buffer on the receiver's GPU that is filled while the engine serves (one slot, packed by the receiver);
            `gathered`: likewise in host memory, only those that `buffered` names;
            `staged`: every bucket has its own slot and is filled while the engine serves; `overlapped`: slots are
            reused inside the pause, filling and applying at the same time; `serial`: one slot, one thing at a time.
        slot_bytes: Size of one slot.
        depth: Number of slots; bucket `b` uses slot `b % depth`.
        why: One sentence for the report.
    """

    mode: RingMode
    slot_bytes: int
    depth: int
    why: str


@dataclass(frozen=True)
class TransferPlan:
    """Everything one receiver does in one update, as integers.

    `direct` from mapped memory (ring modes in `MAPPED_MODES`) has only `apply`, whose sources are `segments`. Every
    other way goes through the ring: bucket `b` is first made in its slot by `fill` (on the owner of the bucket, or
    read by a transport; its sources are `segments`, its destination is the slot), then `apply` copies from the slot
    into live tensors.

    Attributes:
        route: `direct`, `broadcast` or `p2p`.
        transport: Name of the transport that moves the bytes to the receiver (`memory`, `tcp`, ...).
        why: One sentence for the report: why this route.
        segments: What `fill.src_block` (ring) or `apply.src_block` (no ring) index.
        segment_holder: Index of the holder of each segment, into the update's holders; shape (len(segments),).
        fill: Copies into slots, sorted by bucket; empty without a ring.
        fill_starts: Bucket `b` is rows `[fill_starts[b], fill_starts[b + 1])` of `fill`; shape (B + 1,).
        apply: Copies into live tensors or opaque buffers, sorted by bucket. `dst_block` below `num_targets` is a
            target of the recipe, from there on an opaque buffer.
        apply_starts: Bucket bounds in `apply`; shape (B + 1,).
        bucket_owner: Holder index that fills each bucket; shape (B,).
        bucket_bytes: Used bytes of each bucket; shape (B,).
        opaque: Source ids (of the recipe) behind each opaque buffer, in order.
        num_targets: Number of targets in the recipe.
        num_bytes: Bytes that reach this receiver.
        ring: How memory is used in between.
        lent: Opaque sources that the loader reads where they lie, in mapped memory, instead of in a buffer: position
            in `opaque`, index of the segment, first byte, number of bytes; shape (L, 4).
        key: Equal for plans that are equal but for the version.
    """

    route: str
    transport: str
    why: str
    segments: tuple[SegmentDescriptor, ...]
    segment_holder: I32
    fill: CopyTable
    fill_starts: I64
    apply: CopyTable
    apply_starts: I64
    bucket_owner: I32
    bucket_bytes: I64
    opaque: I32
    num_targets: int
    num_bytes: int
    ring: Ring
    lent: I64
    key: str

    @property
    def num_buckets(self) -> int:
        """Number of buckets."""
        return len(self.apply_starts) - 1

    @property
    def reads(self) -> CopyTable:
        """All that is read out of `segments`: by copies, and by the loader, whose rows are plain bytes to block -1."""
        copies = self.apply if self.ring.mode in MAPPED_MODES else self.fill
        _, segment, begin, num_bytes = self.lent.T
        count, width = len(self.lent), copies.shape.shape[1]
        shape, strides = np.ones((count, width), np.int64), np.zeros((count, width), np.int64)
        shape[:, -1:], strides[:, -1:] = num_bytes[:, None], 1
        nowhere, byte = np.full(count, -1, np.int32), np.full(count, dtype_code("uint8"), np.uint8)
        first = np.zeros(count, np.int64)
        lent = CopyTable(
            segment.astype(np.int32), begin, strides, nowhere, first, strides, shape, byte, byte
        )
        return CopyTable(
            *(np.concatenate((getattr(copies, f.name), getattr(lent, f.name))) for f in fields(CopyTable))
        )


@dataclass(frozen=True)
class BroadcastPlan:
    """What the broadcasting holders do together, equal on all of them; receivers have only their `apply` tables.

    Bucket `b` is made in slot `b % ring.depth` by its owner from its own segments (`fill`), then broadcast whole to
    every member; buckets go in ascending order on every member.

    Attributes:
        segments: What `fill.src_block` indexes.
        segment_holder: Holder index of each segment; shape (len(segments),).
        fill: Copies into slots, sorted by bucket; destination bytes count from the slot's begin.
        fill_starts: Bucket bounds in `fill`; shape (B + 1,).
        bucket_owner: Holder index that fills each bucket; shape (B,).
        bucket_bytes: Used bytes of each bucket; shape (B,).
        ring: Slots, equal on all members.
    """

    segments: tuple[SegmentDescriptor, ...]
    segment_holder: I32
    fill: CopyTable
    fill_starts: I64
    bucket_owner: I32
    bucket_bytes: I64
    ring: Ring


@dataclass(frozen=True)
class DigestTable:
    """Boxes to make digests of: N rows; the digests of rows with equal `group` are added, modulo 2^64.

    Element `x` of row `i` lies in memory block `block[i]` at byte `base[i] + sum((x - offsets[i]) * strides[i])`,
    has dtype `src_dtype[i]`, and is cast to `dst_dtype[i]` before its bits are taken. Dims are the source
    parameter's, padded behind with extent 1; `ndim[i]` of them are real.

    Attributes:
        offsets: Box begin in the parameter's index space, shape (N, D).
        shape: Box extents, shape (N, D).
        extents: Shape of the whole parameter, shape (N, D).
        ndim: Dims of the parameter, shape (N,).
        block: Memory block, shape (N,).
        base: Byte of the first element, shape (N,).
        strides: Bytes per step, shape (N, D).
        src_dtype: Code of the dtype in memory, shape (N,).
        dst_dtype: Code of the dtype whose bits count, shape (N,).
        group: Which sum the row belongs to, shape (N,). Receivers and planner count recipe targets first, then
            opaque buffers.
    """

    offsets: I64
    shape: I64
    extents: I64
    ndim: U8
    block: I32
    base: I64
    strides: I64
    src_dtype: U8
    dst_dtype: U8
    group: I32

    def __len__(self) -> int:
        return len(self.block)


@dataclass(frozen=True)
class UpdatePlan:
    """The whole update: one TransferPlan per receiver, what holders broadcast, what holders must digest.

    Attributes:
        receivers: One per receiver, in the order the planner was asked.
        broadcast: What holders do together, if any receiver's route is `broadcast`.
        digests: Per receiver, per holder index: what that holder sums up so that its groups can be compared with
            the receiver's. Receivers with equal needs share one dict.
    """

    receivers: tuple[TransferPlan, ...]
    broadcast: BroadcastPlan | None
    digests: tuple[dict[int, DigestTable], ...]
