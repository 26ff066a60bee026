"""What a ring is to its holder, and one broadcast as one member sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import torch

from headrace.manifest import SegmentDescriptor
from headrace.pipeline import PipelineStage, RingSignals
from headrace.plan import BroadcastPlan, CopyTable
from headrace.segments.cuda import CudaSegment
from headrace.segments.host import HostSegment
from headrace.transports.collective import BroadcastGroup


@dataclass(frozen=True)
class Cast:
    """One member's part in one broadcast.

    Attributes:
        plan: What all members do.
        member: This member.
        holder_of_member: Holder index of each member.
        segments: This holder's segments of the version.
        deadline_s: Limit for each wait.
        alive: Called while waiting; raises to break the broadcast off.
    """

    plan: BroadcastPlan
    member: int
    holder_of_member: tuple[int, ...]
    segments: Sequence[HostSegment | CudaSegment]
    deadline_s: float
    alive: Callable[[], None]

    def is_mine(self, bucket: int) -> bool:
        """Return whether this member fills a bucket."""
        return int(self.plan.bucket_owner[bucket]) == self.holder_of_member[self.member]

    def root(self, bucket: int) -> int:
        """Return the member that a bucket comes from."""
        return self.holder_of_member.index(int(self.plan.bucket_owner[bucket]))

    def fill(self, bucket: int) -> CopyTable:
        """Return the copies that make a bucket in its slot."""
        begin, end = self.plan.fill_starts[bucket : bucket + 2].tolist()
        return self.plan.fill.take(slice(begin, end))

    @cached_property
    def blocks(self) -> list[torch.Tensor]:
        """What `fill` reads: this holder's segments, nothing in place of those of others."""
        own = {segment.descriptor.segment_id: segment for segment in self.segments}
        none = torch.empty(0, dtype=torch.uint8)
        found = (own.get(segment.segment_id) for segment in self.plan.segments)
        return [none if segment is None else segment.tensor for segment in found]

    @property
    def used(self) -> list[HostSegment]:
        """This holder's segments in host memory that `fill` reads."""
        named = {segment.segment_id for segment in self.plan.segments}
        return [s for s in self.segments if isinstance(s, HostSegment) and s.descriptor.segment_id in named]

    @cached_property
    def fill_key(self) -> str:
        """Digest of everything that copies bound to slots depend on, but the slots."""
        plan = self.plan
        facts = (self.member, self.holder_of_member, plan.ring, [s.segment_id for s in plan.segments])
        digest = hashlib.sha256(repr(facts).encode())
        columns = [getattr(plan.fill, field.name) for field in fields(plan.fill)]
        for column in (*columns, plan.fill_starts, plan.bucket_owner, plan.bucket_bytes):
            digest.update(column.tobytes())
        return digest.hexdigest()


class Ring(Protocol):
    """Slots and signals of one holder.

    Call order: 1. `prepare`. 2. `stages`, run to their end. 3. Again from 1, or `close`.
    """

    @property
    def key(self) -> tuple[str, int, int]:
        """GPU (empty: host memory), bytes and number of receivers: a ring with the same key serves as well."""
        ...

    @property
    def device(self) -> torch.device | None:
        """The GPU that slots lie on; None for host memory."""
        ...

    @property
    def descriptors(self) -> tuple[SegmentDescriptor, SegmentDescriptor]:
        """What receivers open: slots, signals."""
        ...

    @property
    def words(self) -> RingSignals:
        """The signals."""
        ...

    def prepare(self, cast: Cast) -> None:
        """Make everything that need not be made between buckets. Blocking.

        Raises:
            HeadraceError: This broadcast cannot be.
        """
        ...

    def stages(self, cast: Cast, group: BroadcastGroup) -> list[PipelineStage]:
        """Return what is done to each bucket, in order, until receivers may have it."""
        ...

    def close(self) -> None:
        """Release slots and signals; mappings that receivers have stay valid. Idempotent."""
        ...
