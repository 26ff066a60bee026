"""HostRing: slots in host memory, filled by the CPU and broadcast by gloo; receivers map them."""

from __future__ import annotations

import torch

from headrace.manifest import SegmentDescriptor
from headrace.pipeline import PipelineStage, RingSignals, signal_bytes
from headrace.rings.cast import Cast
from headrace.segments.host import HostSegment
from headrace.segments.lending import Lender
from headrace.transports.collective import BroadcastGroup
from headrace.transports.program import CopyProgram


class HostRing:
    """Slots and signals in sealed memory of this host, lent to the receivers.

    Args:
        num_bytes: Size of all slots.
        num_receivers: Workers that take from them.
        lender: Lends both.

    Raises:
        CapacityError: The host has no room.
    """

    def __init__(self, num_bytes: int, num_receivers: int, lender: Lender) -> None:
        self.key = ("", num_bytes, num_receivers)
        self.device: torch.device | None = None
        self._lender = lender
        self._slots = HostSegment(num_bytes, "headrace-ring")
        self._signals = HostSegment(signal_bytes(num_receivers), "headrace-signals", peers_write=True)
        self.words = RingSignals(self._signals.tensor)
        for segment in (self._slots, self._signals):
            lender.lend(segment)

    @property
    def descriptors(self) -> tuple[SegmentDescriptor, SegmentDescriptor]:
        """What receivers open."""
        return self._slots.descriptor, self._signals.descriptor

    def prepare(self, cast: Cast) -> None:
        """Do nothing: copies are bound bucket by bucket."""

    def stages(self, cast: Cast, group: BroadcastGroup) -> list[PipelineStage]:
        """Return `fill`, by the CPU, and `broadcast`, which also tells receivers."""
        plan, slots, size = cast.plan, self._slots.tensor, cast.plan.ring.slot_bytes

        def fill(bucket: int, slot: int) -> None:
            if cast.is_mine(bucket):
                target = slots[slot * size : (slot + 1) * size]
                CopyProgram(cast.fill(bucket), cast.blocks, [target]).run()

        def send(bucket: int, slot: int) -> None:
            begin = slot * size
            group.broadcast(slots[begin : begin + int(plan.bucket_bytes[bucket])], cast.root(bucket))
            self.words.announce(bucket + 1)

        return [PipelineStage("fill", fill), PipelineStage("broadcast", send)]

    def close(self) -> None:
        """Release both; idempotent."""
        self.words.cancel()
        for segment in (self._slots, self._signals):
            self._lender.withdraw(segment.descriptor.segment_id)
            segment.close()
