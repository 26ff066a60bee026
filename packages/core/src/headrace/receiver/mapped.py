"""Mappings: holders' memory in this worker's address space, and the copies out of it that are bound already."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from headrace.errors import HeadraceError
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.plan import TransferPlan
from headrace.receiver.blocks import StagingArea
from headrace.receiver.buckets import Bucket, bounds_of, mapped_bucket
from headrace.recipe import LoadRecipe
from headrace.segments.host import MappedSegment
from headrace.segments.lending import borrow, probe
from headrace.transports.memory import MemoryTransport

POPULATE_CHUNK_BYTES = 16 << 20
_KEPT_PLANS = 2

_Key = tuple[str, tuple[str, ...], tuple[tuple[int, int], ...]]


class Mappings:
    """Keeps mappings over updates, and buckets: holders alternate between two sets of segments, plans stay.

    Call order, per update: 1. `drop_dead`. 2. `open`. 3. `bind`. 4. `lent`. 5. `keep`. 6. `unlend`. And `close` in the
    end.

    Args:
        area: Where copies out of it may be staged.
    """

    def __init__(self, area: StagingArea) -> None:
        self._area = area
        self._transport = MemoryTransport()
        self._sockets: dict[str, str] = {}
        self._recent: deque[frozenset[str]] = deque(maxlen=_KEPT_PLANS)
        self._bound: dict[_Key, list[Bucket]] = {}
        self._lent: list[MappedSegment] = []

    def drop_dead(self, deadline_s: float) -> None:
        """Drop what was mapped from holders that are gone: as large as a checkpoint, it lives only by being mapped."""
        gone = {socket for socket in set(self._sockets.values()) if not _has_lender(socket, deadline_s)}
        self._retain({segment for segment, socket in self._sockets.items() if socket not in gone})

    def open(
        self, plan: TransferPlan, holders: Sequence[HolderAddress], deadline_s: float, *, pin: bool
    ) -> None:
        """Map a plan's segments, and touch the pages of those that it copies from, or page-lock them, in chunks."""
        copied = set(plan.apply.src_block.tolist())
        for number, segment in enumerate(plan.segments):
            holder = holders[int(plan.segment_holder[number])]
            self._transport.open(holder, segment, deadline_s)
            self._sockets[segment.segment_id] = holder.unix_socket
            if number in copied:
                self._transport.mapping(segment.segment_id).prepare(POPULATE_CHUNK_BYTES, pin=pin)

    def bind(self, plan: TransferPlan, blocks: list[torch.Tensor]) -> list[Bucket]:
        """Return the plan's buckets, bound to mappings and `blocks`; those of an earlier update where both are as then.

        Those that stage through memory of this update, or fill what the engine's loader gets, are not kept.
        """
        key = (
            plan.key,
            tuple(segment.segment_id for segment in plan.segments),
            tuple((block.data_ptr(), block.numel()) for block in blocks),
        )
        found = self._bound.pop(key, None) or self._make(plan, blocks)
        if len(blocks) == plan.num_targets and all(bucket.lasting for bucket in found):
            self._bound[key] = found
        return found

    def lent(
        self,
        plan: TransferPlan,
        recipe: LoadRecipe,
        holders: Sequence[HolderAddress],
        deadline_s: float,
        *,
        pin: bool,
    ) -> dict[str, torch.Tensor]:
        """Return the opaque sources that the loader reads where they lie, by name; they must not be written to.

        They lie in mappings of their own: one copy of CUDA may not cross from one page-locked chunk into the next, and
        the loader's copies know nothing of chunks. `pin` page-locks each in one piece, until `unlend`: copies to a GPU
        are several times as fast, and an engine that serves would be held up for as long as that takes.
        """
        self.unlend()
        found, sources = {}, {}
        for number in np.unique(plan.lent[:, 1]).tolist():
            holder = holders[int(plan.segment_holder[number])]
            sources[number] = self._whole(plan.segments[number], holder, deadline_s, pin=pin)
        with torch.inference_mode():
            for position, number, begin, num_bytes in plan.lent.tolist():
                meta = recipe.sources[int(plan.opaque[position])]
                part = sources[number][begin : begin + num_bytes]
                found[meta.name] = part.view(getattr(torch, meta.dtype)).view(meta.shape)
        return found

    def unlend(self) -> None:
        """Page-lock what was lent no longer; it stays mapped as long as its tensors live. Idempotent."""
        while self._lent:
            self._lent.pop().close()

    def keep(self, plan: TransferPlan) -> None:
        """Drop what neither this plan nor the one before uses."""
        self._recent.append(frozenset(segment.segment_id for segment in plan.segments))
        self._retain(set().union(*self._recent))
        for key in list(self._bound)[:-_KEPT_PLANS]:
            del self._bound[key]

    def _retain(self, segment_ids: set[str]) -> None:
        self._bound = {key: found for key, found in self._bound.items() if segment_ids.issuperset(key[1])}
        self._sockets = {segment: socket for segment, socket in self._sockets.items() if segment in segment_ids}
        self._transport.retain(segment_ids)

    def _whole(
        self, segment: SegmentDescriptor, holder: HolderAddress, deadline_s: float, *, pin: bool
    ) -> torch.Tensor:
        if segment.kind == "cuda":
            return self._transport.mapped(segment.segment_id)
        mapped = borrow(holder.unix_socket, segment, deadline_s)
        self._lent.append(mapped)
        mapped.prepare(POPULATE_CHUNK_BYTES, pin=pin, whole=True)
        return mapped.tensor

    def close(self) -> None:
        """Drop all mappings; idempotent."""
        self.unlend()
        self._bound.clear()
        self._transport.close()

    def _make(self, plan: TransferPlan, blocks: list[torch.Tensor]) -> list[Bucket]:
        sources = [self._transport.mapped(segment.segment_id) for segment in plan.segments]
        # A GPU is given everything in one go: its copies run on while the next ones are handed over.
        on_gpu = any(block.is_cuda for block in blocks)
        bounds = [(0, len(plan.apply))] if on_gpu else bounds_of(plan)
        self._area.clear()
        return [mapped_bucket(plan, each, sources, blocks, self._area) for each in bounds]


def _has_lender(unix_socket: str, deadline_s: float) -> bool:
    """Return whether a lender listens there, be it one that is slow or strange."""
    try:
        return probe(unix_socket, deadline_s)
    except HeadraceError:
        return True
