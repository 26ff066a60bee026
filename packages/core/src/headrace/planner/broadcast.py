"""The broadcast route: holders put each needed byte on the ring once; receivers take what is theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from headrace.geometry import RegionTable
from headrace.plan import CopyTable, DigestTable, Ring
from headrace.planner.bodies import Body, Needed, Packed, compacted, uncovered_error
from headrace.planner.copies import finish, make_copies
from headrace.planner.digest_tables import digest_table, digests_by_holder
from headrace.planner.holdings import Holdings
from headrace.planner.join import BoxIndex, join, restrict, uncovered, volumes
from headrace.planner.ring import Packing
from headrace.types import I32, I64, ITEMSIZES, U8


@dataclass(frozen=True)
class Broadcast:
    """What goes over the ring: disjoint boxes with one owner each, and how they are packed.

    Attributes:
        boxes: Disjoint boxes, placed in their owners' segments, sorted by (param, offsets).
        owner: Position of each box's owner, shape (N,).
        index: Index of `boxes`.
        slots: The boxes, cut, as they lie in slots, sorted by (param, offsets).
        slot_index: Index of `slots`.
        dtype: Dtype code of each row of `slots`.
        bucket: Bucket of each row of `slots`.
        packing: Owner and used bytes of each bucket.
        ring: Slots, equal on all members.
        fill: Owner segments to slots; blocks are positions in `segments`.
        fill_starts: Bucket bounds in `fill`.
        segments: Segments used.
        num_bytes: Bytes that every receiver sees.
    """

    boxes: RegionTable
    owner: I32
    index: BoxIndex
    slots: RegionTable
    slot_index: BoxIndex
    dtype: U8
    bucket: I64
    packing: Packing
    ring: Ring
    fill: CopyTable
    fill_starts: I64
    segments: I64
    num_bytes: int

    @classmethod
    def of(cls, needs: Sequence[Needed], holdings: Holdings, bucket_bytes: int, room_bytes: int) -> Broadcast:
        """Choose owners for all parameters that `needs` use and pack them into a ring of `room_bytes`.

        Raises:
            CapacityError: No slot fits into the smallest budget.
        """
        params = needs[0].params
        boxes, owner = _owned(needs, holdings)
        dtype = params.dtype_codes[boxes.param]
        packed = Packed.of(boxes, owner, dtype, bucket_bytes)
        ring = packed.ring(room_bytes, 0)
        if ring.slot_bytes < packed.slot_bytes:
            packed = Packed.of(boxes, owner, dtype, ring.slot_bytes)
        ring = packed.settled(ring)
        fill, fill_starts = packed.fill()
        segments, local = compacted(fill.src_block)
        order = np.lexsort((packed.src.offsets[:, 0], packed.src.param))
        slots = packed.slots().take(order)
        return cls(
            boxes=boxes,
            owner=owner,
            index=_indexed(boxes, len(params)),
            slots=slots,
            slot_index=_indexed(slots, len(params)),
            dtype=packed.dtype[order],
            bucket=packed.packing.bucket[order],
            packing=packed.packing,
            ring=ring,
            fill=replace(fill, src_block=local),
            fill_starts=fill_starts,
            segments=segments,
            num_bytes=int((volumes(boxes.shape) * ITEMSIZES[dtype]).sum()),
        )

    def body(self, needed: Needed) -> Body:
        """Return one receiver's tables: from the slots into its tensors.

        Raises:
            UncoveredRegionError: Names what no holder broadcasts.
        """
        pairs = join(needed.table, self.slot_index)
        missing = uncovered(needed.table, pairs)
        if len(missing):
            raise uncovered_error(needed, self.index, missing)
        src = restrict(self.slots, pairs.box, pairs.offsets, pairs.shape)
        dst = restrict(needed.table, pairs.need, pairs.offsets, pairs.shape)
        copies = make_copies(src, dst, self.dtype[pairs.box], needed.dtype[pairs.need])
        apply, starts = finish(copies, self.bucket[pairs.box], len(self.packing.owner))
        return Body(
            fill=CopyTable.empty(),
            fill_starts=np.zeros(len(starts), np.int64),
            apply=apply,
            apply_starts=starts,
            bucket_owner=self.packing.owner,
            bucket_bytes=self.packing.num_bytes,
            ring=self.ring,
            segments=np.zeros(0, np.int64),
            num_bytes=self.num_bytes,
        )

    def without_slots(self) -> Broadcast:
        """Return it for digests alone: no `body` can be made of it, and its tables are half as large."""
        none = np.zeros(0, np.int64)  # by index, since a slice would keep all of a column
        slots = self.slots.take(none)
        index = _indexed(slots, len(self.slot_index.overlapping))
        return replace(self, slots=slots, slot_index=index, dtype=self.dtype[none], bucket=self.bucket[none])

    def digests(self, needed: Needed, segment_start: I64) -> dict[int, DigestTable]:
        """Return, per holder position, what it sums up for one receiver."""
        pairs = join(needed.table, self.index)
        src = restrict(self.boxes, pairs.box, pairs.offsets, pairs.shape)
        src_dtype: U8 = needed.src_dtype[pairs.need]
        group = needed.table.block[pairs.need]
        table = digest_table(src, needed.params, needed.ndims, src_dtype, needed.dtype[pairs.need], group)
        return digests_by_holder(table, self.owner[pairs.box], segment_start)


def _owned(needs: Sequence[Needed], holdings: Holdings) -> tuple[RegionTable, I32]:
    """Return disjoint boxes of every parameter that somebody needs, placed at their owner."""
    params = needs[0].params
    used = np.zeros(len(params), np.bool_)
    for needed in needs:
        used[needed.table.param] = True
    ids = np.flatnonzero(used).astype(np.int32)
    shape, none = params.shapes[ids], np.zeros(len(ids), np.int64)
    whole = RegionTable(ids, np.zeros_like(shape), shape, none.astype(np.int32), none, np.zeros_like(shape))
    pairs = join(whole, holdings.boxes)
    num_bytes = volumes(pairs.shape) * ITEMSIZES[params.dtype_codes[whole.param[pairs.need]]]
    weights = np.bincount(pairs.box, num_bytes, len(holdings.boxes)).astype(np.int64)
    rows = holdings.choose(weights)[pairs.box]
    boxes = restrict(holdings.regions, rows, pairs.offsets, pairs.shape)
    order = np.lexsort((boxes.offsets[:, 0], boxes.param))
    return boxes.take(order), holdings.holder[rows][order]


def _indexed(table: RegionTable, num_params: int) -> BoxIndex:
    return BoxIndex.build(table.param, table.offsets, table.shape, num_params)
