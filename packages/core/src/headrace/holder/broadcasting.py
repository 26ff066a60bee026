"""Broadcasting: a holder's ring, and the group in which holders pass each other's buckets on."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch

from headrace import wire
from headrace.errors import BackendUnavailableError, ConfigError, LocalProtocolError, PeerLostError
from headrace.pipeline import RingPipeline
from headrace.rings import Cast, DeviceRing, HostRing, Pins, Ring
from headrace.segments.cuda import CudaSegment, gpu_of
from headrace.segments.host import HostSegment
from headrace.segments.lending import Lender
from headrace.telemetry import Recorder
from headrace.transports.collective import Alone, BroadcastGroup, GlooGroup, NcclGroup, require_nccl

JOIN_S = 50.0


class Broadcasting:
    """One holder's part in broadcasts. Ring and group are kept from one to the next, where they serve as well.

    `join` and `cast` are called by the holder's two working threads, which the coordinator has take turns; the rest by
    any.

    Args:
        lender: Lends the ring to workers of this host.
        recorder: Takes the spans.
    """

    def __init__(self, lender: Lender, recorder: Recorder) -> None:
        self._lender = lender
        self._recorder = recorder
        self._group: BroadcastGroup | None = None
        self._ring: Ring | None = None
        self._pins = Pins()
        self._cancel = threading.Event()

    def permit(self) -> None:
        """Let the next broadcast begin, after others were cancelled."""
        self._cancel.clear()

    def cancel(self) -> None:
        """Have a broadcast that is under way, or waits for its turn, fail soon."""
        self._cancel.set()

    def close(self) -> None:
        """Give back ring and group; nothing may be under way."""
        self.leave()
        self._drop_ring()
        self._pins.close()

    def join(self, message: wire.JoinRing) -> wire.RingReady:
        """Have a ring, and be a member of the group where the message names its store."""
        try:
            ring = self._make_ring(message)
        except (BackendUnavailableError, ConfigError) as error:
            if not message.device_uuid:
                raise
            return wire.RingReady(ring=None, signals=None, refused=str(error))
        if message.store:
            self._join_group(message, ring.device)
        slots, signals = ring.descriptors
        return wire.RingReady(ring=slots, signals=signals)

    def _join_group(self, message: wire.JoinRing, device: torch.device | None) -> None:
        store, rank, size = message.store, message.rank, message.world_size
        if self._group is not None and self._group.place == (store, size, device):
            return
        self.leave()
        if device is None:
            self._group = GlooGroup(store, rank, size, JOIN_S)
        elif size == 1:
            self._group = Alone(store, device)
        else:
            self._group = NcclGroup(store, rank, size, JOIN_S, device)

    def leave(self) -> None:
        """Leave the group, also while a collective of it is under way, which may never end otherwise."""
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _make_ring(self, message: wire.JoinRing) -> Ring:
        """Return a ring for an update: the kept one, where it serves as well."""
        wanted = (message.device_uuid, message.ring_bytes, message.num_receivers)
        if self._ring is not None and self._ring.key == wanted:
            self._ring.words.reset()
            return self._ring
        self._drop_ring()
        if message.device_uuid:
            gpu_of(message.device_uuid)
            if message.world_size > 1:
                require_nccl()
            self._ring = DeviceRing(*wanted, self._lender, self._pins)
        else:
            self._ring = HostRing(message.ring_bytes, message.num_receivers, self._lender)
        return self._ring

    def _drop_ring(self) -> None:
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()

    def cast(self, message: wire.Broadcast, held: Sequence[HostSegment | CudaSegment]) -> wire.BroadcastDone:
        """Pass all buckets on, of `held` and of the other holders; returns when this one's receivers have them."""
        ring, group = self._ring, self._group
        if ring is None or group is None:
            raise LocalProtocolError("a broadcast needs JoinRing first", phase="broadcast")
        plan = message.plan
        cast = Cast(plan, message.member, message.holder_of_member, held, message.deadline_s, self._check_cancel)
        pipeline: RingPipeline | None = None
        limit = time.monotonic() + message.deadline_s
        try:
            with self._recorder.span("bind"):
                ring.prepare(cast)
            num_buckets, sizes = len(plan.bucket_owner), plan.bucket_bytes.tolist()
            pipeline = RingPipeline(
                ring.stages(cast, group), num_buckets, plan.ring.depth, self._recorder, sizes
            )
            pipeline.start()
            self._pass_on(pipeline, ring, num_buckets, limit)
        except BaseException:
            self._break_off(ring, pipeline)
            raise
        pipeline.close()
        return wire.BroadcastDone(spans=tuple(self._recorder.drain()))

    def _break_off(self, ring: Ring, pipeline: RingPipeline | None) -> None:
        """Leave nothing of a broken broadcast: receivers that come late must not find words of the next one."""
        self._cancel.set()
        ring.words.cancel()
        self.leave()
        if pipeline is not None:
            pipeline.close()
        self._drop_ring()

    def _pass_on(self, pipeline: RingPipeline, ring: Ring, num_buckets: int, limit: float) -> None:
        for bucket in range(num_buckets):
            left = limit - time.monotonic()
            pipeline.wait_ready(bucket, left, self._check_cancel)
            ring.words.wait_applied(bucket + 1, left, self._check_cancel)
            pipeline.release(bucket)

    def _check_cancel(self) -> None:
        if self._cancel.is_set():
            raise PeerLostError("the coordinator cancelled the broadcast", phase="broadcast")
