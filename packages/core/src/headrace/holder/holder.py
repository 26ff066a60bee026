"""Holder: what a coordinator tells a holder, and who does it.

A Holder lives in a thread of the process that owns the source (a trainer, `ParameterServer(tensors=...)`) or in a
process of its own (`python -m headrace.holder`, one part of a checkpoint each).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from secrets import token_bytes

import torch

from headrace import wire
from headrace.config import HostSettings
from headrace.control.dialer import Dialer
from headrace.digests import digest
from headrace.errors import (
    LocalProtocolError,
    PeerLostError,
    RemoteFailure,
    TransportClosedError,
)
from headrace.futures import wait_ended
from headrace.holder.broadcasting import Broadcasting
from headrace.manifest import HolderAddress
from headrace.protocols import SteppedSource, WeightSource
from headrace.segments.host import HostSegment
from headrace.segments.lending import Lender
from headrace.store.device import DeviceSource, LentStore
from headrace.store.live import LiveStore
from headrace.store.store import Store
from headrace.telemetry import Recorder
from headrace.transports.mooncake_gate import Gate, Shown
from headrace.transports.tcp_server import TcpServer

logger = logging.getLogger(__name__)
_PROGRESS_EVERY_S = 0.1
SETTLE_S = 5.0
CLOSE_S = 50.0
Work = Callable[..., wire.Message | None]


@dataclass(frozen=True, slots=True)
class HolderTicket:
    """How a holder reaches its coordinator; handed over privately (stdin, in-process, torchrun's store)."""

    endpoint: str
    server_key: str
    token: str
    index: int


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
        self._tcp = TcpServer(self._held, self._secret, host)
        self._dialer = Dialer(ticket.endpoint, ticket.server_key)
        self._token = ticket.token
        self._broadcasting = Broadcasting(self._lender, self._recorder)
        self._stop_reading = threading.Event()
        self._jobs: list[Future[None]] = []
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
        """Release sockets and memory; idempotent. Memory that a call may still use goes when that has ended."""
        self._break_all_off()
        for pool in (self._work, self._broadcasts):
            pool.shutdown(wait=False, cancel_futures=True)
        self._broadcasting.leave()
        hung = wait_ended(self._jobs, CLOSE_S)
        self._dialer.close(linger_s=1.0)
        self._tcp.close()
        if self._gate is not None:
            self._gate.close()
        self._lender.close()
        if hung:
            logger.warning("%s leaves behind what did not end within %.0f s", self.name, CLOSE_S)
            threading.Thread(target=self._release, args=(hung,), name="headrace-holder-end", daemon=True).start()
        else:
            self._release(())

    def _release(self, hung: Collection[Future[None]]) -> None:
        wait_ended(hung)
        self._broadcasting.close()
        self._store.close()
        if self._owns_source:
            self._source.close()

    def _take(self, message: wire.AnyMessage) -> None:
        if isinstance(message, wire.CancelBroadcast):
            self._broadcasting.cancel()
        elif isinstance(message, wire.Pin):
            if isinstance(self._store, Store):
                self._store.pin(message.version, message.pinned)
        elif isinstance(message, wire.Settle):
            self._break_all_off()
            self._begin(self._work, "settle", self._settle, message)
        elif isinstance(message, wire.Broadcast):
            self._broadcasting.permit()
            self._begin(self._broadcasts, "broadcast", self._serve, message)
        else:
            if isinstance(message, wire.Publish | wire.Fill):
                self._stop_reading.clear()
            self._begin(self._work, type(message).__name__.lower(), self._serve, message)

    def _break_all_off(self) -> None:
        """Have what reads or broadcasts now, or waits for its turn to, fail soon; what is asked for later does not."""
        self._stop_reading.set()
        self._broadcasting.cancel()

    def _begin(self, pool: ThreadPoolExecutor, phase: str, work: Work, message: wire.AnyMessage) -> None:
        self._jobs = [job for job in self._jobs if not job.done()]
        self._jobs.append(pool.submit(self._answer, phase, work, message))

    def _answer(self, phase: str, work: Work, message: wire.AnyMessage) -> None:
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
            case wire.Broadcast():
                return self._broadcasting.cast(message, self._store.segments(message.version))
            case wire.SumDigests():
                return self._sum_digests(message)
            case wire.JoinRing():
                return self._broadcasting.join(message)
            case wire.Release():
                self._store.release(message.version)
                return None
            case _:
                text = f"a holder has no answer to {type(message).__name__}"
                raise LocalProtocolError(text)

    def _settle(self, message: wire.Settle) -> wire.Settled:
        """Wait for a cancelled broadcast; the group may be inside a collective that never ends, so it is left.

        What was read when `Settle` came has ended before: it is the same thread's.
        """
        self._broadcasting.leave()
        self._broadcasts.submit(int).result(SETTLE_S)
        return wire.Settled(nonce=message.nonce)

    def _teller(self) -> Callable[[int, int], None]:
        """Return what tells the coordinator, now and then, how many bytes are done of how many.

        It raises PeerLostError, which ends the reading that calls it, once the coordinator wants no more of that.
        """
        told = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told
            if self._stop_reading.is_set():
                raise PeerLostError("the coordinator broke the reading off", phase="read")
            if time.monotonic() - told > _PROGRESS_EVERY_S or done == total:
                told = time.monotonic()
                self._dialer.send(wire.Progress(done_bytes=done, total_bytes=total))

        return progress

    def _fill(self, message: wire.Fill) -> wire.Filled:
        if not isinstance(self._store, LiveStore):
            raise LocalProtocolError(f"{self.name} holds no trainer's steps", phase="read")
        with self._recorder.span("read"):
            rows, limit_s = message.rows.tolist(), message.deadline_s
            self._store.fill(message.version, message.step, rows, self._teller(), limit_s)
        return wire.Filled(spans=tuple(self._recorder.drain()))

    def _publish(self, message: wire.Publish) -> wire.Published:
        with self._recorder.span("read"):
            self._store.publish(message.version, self._teller(), message.deadline_s)
        manifest = self._store.manifest(message.version, self.address)
        self._show_held()
        layout = manifest.place_key
        return wire.Published(
            layout=layout,
            manifest=None if layout in message.known_layouts else manifest,
            spans=tuple(self._recorder.drain()),
        )

    def _held(self, segment_id: str) -> torch.Tensor | None:
        """Return a segment for the data server, as long as its version is held: the next one is read into it then."""
        segment = self._store.segment(segment_id)
        return segment.tensor if isinstance(segment, HostSegment) else None

    def _show_held(self) -> None:
        """Let Mooncake's readers have the versions that the store holds, and no others."""
        if self._gate is not None:
            held = [segment for version in self._store.versions for segment in self._store.segments(version)]
            shown = [segment for segment in held if isinstance(segment, HostSegment)]
            self._gate.show([Shown(s.descriptor.segment_id, s.descriptor.num_bytes, s.fd) for s in shown])

    def _sum_digests(self, message: wire.SumDigests) -> wire.Digests:
        blocks = self._store.tensors(message.version)
        with self._recorder.span("digest"):
            sums = digest(message.table, blocks, num_groups=message.num_groups)
        return wire.Digests(key=message.key, sums=sums)
