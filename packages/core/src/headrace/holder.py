"""The holder role: a source's weights in this host's memory, lent to receivers, served over TCP, broadcast in rings.

A Holder lives in a thread of the process that owns the source (a trainer, `ParameterServer(tensors=...)`) or in a
process of its own (`python -m headrace.holder`, one part of a checkpoint each).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_bytes

import torch

from headrace import wire
from headrace.config import HostSettings, host_settings
from headrace.control.dialer import Dialer
from headrace.digests import digest
from headrace.errors import (
    HeadraceError,
    LocalProtocolError,
    PeerLostError,
    RemoteFailure,
    TransportClosedError,
)
from headrace.manifest import HolderAddress
from headrace.pipeline import PipelineStage, RingPipeline, RingSignals, signal_bytes
from headrace.protocols import SteppedSource, WeightSource
from headrace.segments.cuda import CudaSegment
from headrace.segments.host import HostSegment
from headrace.segments.lending import Lender
from headrace.store.checkpoint import CheckpointSource
from headrace.store.device import DeviceSource, LentStore
from headrace.store.live import LiveStore
from headrace.store.store import Store
from headrace.store.tensors import TensorSource
from headrace.telemetry import Recorder
from headrace.transports.collective import BroadcastGroup
from headrace.transports.mooncake_gate import Gate, Shown
from headrace.transports.program import CopyProgram
from headrace.transports.tcp_server import TcpServer

logger = logging.getLogger(__name__)
_PROGRESS_EVERY_S = 0.1
SETTLE_S = 5.0
GIVE_UP_S = 60.0


@dataclass(frozen=True, slots=True)
class HolderTicket:
    """How a holder reaches its coordinator; handed over privately (stdin, in-process, torchrun's store)."""

    endpoint: str
    server_key: str
    token: str
    index: int


@dataclass
class _Ring:
    slots: HostSegment
    signals: HostSegment
    words: RingSignals


class Holder:
    """Serves one source's part until it is told to leave or its coordinator is gone.

    Args:
        source: What to hold; read at every `Publish`.
        ticket: Where the coordinator is.
        host: Sockets and who may open them.
        owns_source: Whether `close` also closes the source.
    """

    def __init__(
        self, source: WeightSource, ticket: HolderTicket, host: HostSettings, *, owns_source: bool = True
    ) -> None:
        self.name = f"holder-{ticket.index}-{token_bytes(4).hex()}"
        self._index = ticket.index
        self._source = source
        self._owns_source = owns_source
        self._recorder = Recorder(f"holder {ticket.index}")
        self._gate = Gate(host) if host.mooncake else None
        self._lender = Lender(host)
        self._store: Store | LentStore | LiveStore
        if isinstance(source, DeviceSource):
            self._store = LentStore(source, self.name)
        elif isinstance(source, SteppedSource):
            self._store = LiveStore(source, self.name, lender=self._lender)
        else:
            self._store = Store(source, self.name, lender=self._lender)
        self._secret = token_bytes(32)
        self._served: dict[str, torch.Tensor] = {}
        self._tcp = TcpServer(self._served.get, self._secret, host)
        self._dialer = Dialer(ticket.endpoint, ticket.server_key)
        self._token = ticket.token
        self._group: BroadcastGroup | None = None
        self._ring: _Ring | None = None
        self._cancel = threading.Event()
        self._work = ThreadPoolExecutor(1, thread_name_prefix="headrace-holder")
        self._broadcasts = ThreadPoolExecutor(1, thread_name_prefix="headrace-broadcast")

    @property
    def address(self) -> HolderAddress:
        """How receivers reach this holder's memory."""
        return HolderAddress(
            self.name,
            self._lender.unix_socket,
            self._tcp.endpoint,
            self._secret,
            mooncake=self._gate.endpoint if self._gate else "",
        )

    def run(self) -> None:
        """Serve until `Shutdown` or until the coordinator is lost; closes everything. Blocking."""
        try:
            self._lender.start()
            self._dialer.send(wire.HolderHello(token=self._token, index=self._index, pid=os.getpid()))
            while not isinstance(message := self._dialer.receive(None), wire.Shutdown):
                self._take(message)
        except (PeerLostError, TransportClosedError) as error:
            logger.info("%s leaves: %s", self.name, error)
        finally:
            self.close()

    def withdraw(self) -> None:
        """Remove the sockets' names from the file system; what else there is ends with the process."""
        self._lender.close()

    def close(self) -> None:
        """Release memory and sockets; idempotent."""
        self._cancel.set()
        self._work.shutdown(cancel_futures=True)
        self._broadcasts.shutdown(cancel_futures=True)
        self._drop_ring()
        self._dialer.close(linger_s=1.0)
        self._tcp.close()
        if self._gate is not None:
            self._gate.close()
        self._lender.close()
        self._store.close()
        if self._owns_source:
            self._source.close()

    def _take(self, message: wire.AnyMessage) -> None:
        if isinstance(message, wire.CancelBroadcast):
            self._cancel.set()
        elif isinstance(message, wire.Pin):
            if isinstance(self._store, Store):
                self._store.pin(message.version, message.pinned)
        elif isinstance(message, wire.Settle):
            self._cancel.set()
            self._work.submit(self._answer, "settle", self._settle, message)
        elif isinstance(message, wire.Broadcast):
            self._cancel.clear()
            self._broadcasts.submit(self._answer, "broadcast", self._broadcast, message)
        else:
            self._work.submit(self._answer, type(message).__name__.lower(), self._serve, message)

    def _answer(self, phase: str, work: Callable[..., wire.Message | None], message: wire.AnyMessage) -> None:
        """Run `work`; whatever it raises goes to the coordinator as data: this is the rank boundary."""
        try:
            reply = work(message)
        except Exception as error:  # noqa: BLE001 - the rank boundary
            logger.warning("%s failed in %s: %s", self.name, phase, error)
            reply = wire.Failed(failure=RemoteFailure.of(error, phase=phase))
        if reply is not None:
            self._dialer.send(reply)

    def _serve(self, message: wire.AnyMessage) -> wire.Message | None:
        match message:
            case wire.Publish():
                return self._publish(message)
            case wire.Fill():
                return self._fill(message)
            case wire.SumDigests():
                return self._sum_digests(message)
            case wire.JoinRing():
                return self._join_ring(message)
            case wire.Release():
                self._store.release(message.version)
                return None
            case _:
                text = f"a holder has no answer to {type(message).__name__}"
                raise LocalProtocolError(text)

    def _settle(self, message: wire.Settle) -> wire.Settled:
        """Wait for a cancelled broadcast; the group may be inside a collective that never ends, so it is dropped."""
        self._group = None
        self._broadcasts.submit(int).result(SETTLE_S)
        return wire.Settled(nonce=message.nonce)

    def _teller(self) -> Callable[[int, int], None]:
        """Return what tells the coordinator, now and then, how many bytes are done of how many."""
        told = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told > _PROGRESS_EVERY_S or done == total:
                told = time.monotonic()
                self._dialer.send(wire.Progress(done_bytes=done, total_bytes=total))

        return progress

    def _fill(self, message: wire.Fill) -> wire.Filled:
        if not isinstance(self._store, LiveStore):
            raise LocalProtocolError(f"{self.name} holds no trainer's steps", phase="read")
        with self._recorder.span("read"):
            self._store.fill(message.version, message.step, message.rows.tolist(), self._teller())
        return wire.Filled(spans=tuple(self._recorder.drain()))

    def _publish(self, message: wire.Publish) -> wire.Published:
        with self._recorder.span("read"):
            self._store.publish(message.version, self._teller())
        manifest = self._store.manifest(message.version, self.address)
        self._serve_held()
        layout = manifest.place_key
        return wire.Published(
            layout=layout,
            manifest=None if layout in message.known_layouts else manifest,
            spans=tuple(self._recorder.drain()),
        )

    def _serve_held(self) -> None:
        """Let the data server read the versions that the store holds, and no others."""
        held = [segment for version in self._store.versions for segment in self._store.segments(version)]
        wanted = {s.descriptor.segment_id: s.tensor for s in held if s.descriptor.kind == "host"}
        for gone in self._served.keys() - wanted.keys():
            del self._served[gone]
        self._served.update(wanted)
        if self._gate is not None:
            shown = [segment for segment in held if isinstance(segment, HostSegment)]
            self._gate.show([Shown(s.descriptor.segment_id, s.descriptor.num_bytes, s.fd) for s in shown])

    def _sum_digests(self, message: wire.SumDigests) -> wire.Digests:
        blocks = self._store.tensors(message.version)
        with self._recorder.span("digest"):
            sums = digest(message.table, blocks, num_groups=message.num_groups)
        return wire.Digests(key=message.key, sums=sums)

    def _join_ring(self, message: wire.JoinRing) -> wire.RingReady:
        if self._group is None or (self._group.store, self._group.world_size) != (
            message.store,
            message.world_size,
        ):
            self._group = BroadcastGroup(message.store, message.rank, message.world_size, deadline_s=60.0)
        ring = self._make_ring(message.ring_bytes, message.num_receivers)
        return wire.RingReady(ring=ring.slots.descriptor, signals=ring.signals.descriptor)

    def _make_ring(self, ring_bytes: int, num_receivers: int) -> _Ring:
        ring = self._ring
        if ring and (ring.slots.descriptor.num_bytes, ring.words.num_receivers) == (
            ring_bytes,
            num_receivers,
        ):
            ring.words.reset()
            return ring
        self._drop_ring()
        slots = HostSegment(ring_bytes, "headrace-ring")
        signals = HostSegment(signal_bytes(num_receivers), "headrace-signals", peers_write=True)
        self._ring = _Ring(slots, signals, RingSignals(signals.tensor))
        self._lender.lend(slots)
        self._lender.lend(signals)
        return self._ring

    def _drop_ring(self) -> None:
        if self._ring is None:
            return
        self._ring.words.cancel()
        for segment in (self._ring.slots, self._ring.signals):
            self._lender.withdraw(segment.descriptor.segment_id)
            segment.close()
        self._ring = None

    def _broadcast(self, message: wire.Broadcast) -> wire.BroadcastDone:
        ring, group = self._ring, self._group
        if ring is None or group is None:
            raise LocalProtocolError("a broadcast needs JoinRing first", phase="broadcast")
        plan = message.plan
        stages = [
            PipelineStage("fill", self._filler(message, ring)),
            PipelineStage("broadcast", self._caster(message, ring, group)),
        ]
        pipeline = RingPipeline(
            stages, len(plan.bucket_owner), plan.ring.depth, self._recorder, plan.bucket_bytes.tolist()
        )
        limit = time.monotonic() + message.deadline_s
        pipeline.start()
        try:
            self._pass_on(pipeline, ring, len(plan.bucket_owner), limit)
        except HeadraceError:
            ring.words.cancel()
            self._group = None
            raise
        finally:
            pipeline.close()
        return wire.BroadcastDone(spans=tuple(self._recorder.drain()))

    def _filler(self, message: wire.Broadcast, ring: _Ring) -> Callable[[int, int], None]:
        plan, mine = message.plan, message.holder_of_member[message.member]
        held: Sequence[HostSegment | CudaSegment] = self._store.segments(message.version)
        sources = [segment.tensor for segment in held]
        own = {segment.descriptor.segment_id: i for i, segment in enumerate(held)}
        empty = torch.empty(0, dtype=torch.uint8)
        blocks = [sources[own[s.segment_id]] if s.segment_id in own else empty for s in plan.segments]
        slot_bytes = plan.ring.slot_bytes

        def fill(bucket: int, slot: int) -> None:
            if plan.bucket_owner[bucket] != mine:
                return
            rows = plan.fill.take(slice(int(plan.fill_starts[bucket]), int(plan.fill_starts[bucket + 1])))
            target = ring.slots.tensor[slot * slot_bytes : (slot + 1) * slot_bytes]
            CopyProgram(rows, blocks, [target]).run()

        return fill

    def _caster(
        self, message: wire.Broadcast, ring: _Ring, group: BroadcastGroup
    ) -> Callable[[int, int], None]:
        plan = message.plan
        member_of = {holder: member for member, holder in enumerate(message.holder_of_member)}
        slot_bytes = plan.ring.slot_bytes

        def cast(bucket: int, slot: int) -> None:
            begin = slot * slot_bytes
            buffer = ring.slots.tensor[begin : begin + int(plan.bucket_bytes[bucket])]
            group.broadcast(buffer, member_of[int(plan.bucket_owner[bucket])])
            ring.words.announce(bucket + 1)

        return cast

    def _pass_on(self, pipeline: RingPipeline, ring: _Ring, num_buckets: int, limit: float) -> None:
        for bucket in range(num_buckets):
            left = limit - time.monotonic()
            pipeline.wait_ready(bucket, left)
            ring.words.wait_applied(bucket + 1, left, self._check_cancel)
            pipeline.release(bucket)

    def _check_cancel(self) -> None:
        if self._cancel.is_set():
            raise PeerLostError("the coordinator cancelled the broadcast", phase="broadcast")


def source_from(spec: dict[str, object]) -> WeightSource:
    """Build a spawned holder's source: a part of a checkpoint, or nothing (a relay that only broadcasts)."""
    if spec.get("checkpoint"):
        return CheckpointSource(
            str(spec["checkpoint"]), parts=int(str(spec["parts"])), part=int(str(spec["part"]))
        )
    return TensorSource({})


def _give_up(ticket: HolderTicket, error: HeadraceError) -> None:
    """Dial in only to say why this holder cannot be, and wait until that is heard."""
    with Dialer(ticket.endpoint, ticket.server_key) as dialer:
        dialer.send(wire.HolderHello(token=ticket.token, index=ticket.index, pid=os.getpid()))
        dialer.send(wire.Failed(failure=RemoteFailure.of(error, phase="read")))
        with suppress(HeadraceError):
            dialer.receive(GIVE_UP_S)


def _leave_with_parent(holder: Holder) -> None:
    """End this process when stdin closes: the parent holds the other end for its whole life."""
    sys.stdin.read()
    holder.withdraw()
    os._exit(0)


def main() -> None:
    """Run a holder whose ticket and source come as one JSON line on stdin."""
    spec = json.loads(sys.stdin.readline())
    logging.basicConfig(level=spec.get("log_level", "WARNING"))
    torch.set_num_threads(1)
    ticket = HolderTicket(**spec["ticket"])
    try:
        holder = Holder(source_from(spec), ticket, host_settings())
    except HeadraceError as error:
        _give_up(ticket, error)
        return
    threading.Thread(target=_leave_with_parent, args=(holder,), daemon=True).start()
    holder.run()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
