"""The coordinator's end of the control channel: one encrypted socket that receivers and holders dial."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import zmq

from headrace.config import HostSettings, bracketed
from headrace.control.keys import KeyPair, TokenBook
from headrace.control.peers import Event, Lost, PeerId, Received
from headrace.control.router import Arrival, Router
from headrace.control.signals import Wakeup, millis_until
from headrace.errors import (
    ConfigError,
    ProtocolError,
    RemoteFailure,
    TransferTimeoutError,
    TransportClosedError,
)
from headrace.wire import Message, decode, encode

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 256 << 20
_JOIN_S = 10.0


@dataclass(frozen=True, slots=True)
class _Forgotten:
    """Nothing of this peer comes after it: what had come before the thread dropped it is passed over."""

    peer: PeerId


class Hub:
    """Listens for peers, admits those that present a valid token, and tells at once when one is gone.

    The constructor binds and starts one daemon thread, which owns the socket; every method may be called from
    any thread. A peer is lost when its connection breaks (a killed process: milliseconds) or when nothing
    came from it for `heartbeat_s`. What a foreign or broken peer sends never raises here: it is logged,
    answered and dropped.

    Args:
        host: Where to bind and what to advertise.
        heartbeat_s: Silence after which a peer is lost; longer than any engine holds the GIL.

    Raises:
        ConfigError: `bind_host` cannot be bound, or is every address and none was named that peers dial.
    """

    def __init__(self, host: HostSettings, heartbeat_s: float = 10.0) -> None:
        keys = KeyPair.new()
        self.server_key = keys.public
        self._beat_s = min(1.0, heartbeat_s / 4)
        self._tokens = TokenBook()
        self._inbox: queue.SimpleQueue[Arrival | _Forgotten | None] = queue.SimpleQueue()
        self._forgotten: set[PeerId] = set()
        self._tasks: deque[Callable[[], object]] = deque()
        self._closing = threading.Event()
        self._linger_s = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            socket, self.endpoint = _bind(self._context, keys, host)
        except ConfigError:
            self._context.term()
            raise
        self._router = Router(socket, self._tokens, heartbeat_s, self._inbox.put)
        self._wakeup = Wakeup()
        self._thread = threading.Thread(target=self._run, name="headrace-hub", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def admit(self, token: str, uses: int = 1) -> None:
        """Let `uses` peers enter with `token`."""
        self._tokens.admit(token, uses)

    def revoke(self, token: str) -> None:
        """Let nobody more enter with `token`; who is in stays. Idempotent."""
        self._tokens.revoke(token)

    def take_refusals(self) -> list[ProtocolError]:
        """Return why peers were refused since the last call, the newest few."""
        return self._router.take_refusals()

    def receive(self, deadline_s: float) -> Event:
        """Return the next thing that happened, in order per peer; heartbeats are not shown.

        Raises:
            TransferTimeoutError: Nothing happened within the deadline.
            TransportClosedError: `close` was called.
        """
        limit = time.monotonic() + deadline_s
        while True:
            try:
                arrival = self._inbox.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                message = f"no peer of {self.endpoint} said anything within {deadline_s:g} s"
                raise TransferTimeoutError(message, name=self.endpoint, retryable=True) from None
            if arrival is None:
                self._inbox.put(None)
                message = "the control channel was closed"
                raise TransportClosedError(message, name=self.endpoint)
            if isinstance(arrival, _Forgotten):
                self._forgotten.discard(arrival.peer)
            elif (arrival.peer if isinstance(arrival, Lost) else arrival[0]) not in self._forgotten:
                return arrival if isinstance(arrival, Lost) else self._decoded(*arrival)

    def send(self, peer: PeerId, message: Message) -> None:
        """Send to one peer without blocking; silently nothing where it is gone, as `receive` tells that.

        Raises:
            TransportClosedError: `close` was called.
        """
        frames = encode(message)
        self._submit(lambda: self._router.send(peer.identity, frames))

    def forget(self, peer: PeerId) -> None:
        """Drop a peer: no `Lost` follows, what it still sends is ignored. Idempotent."""
        self._drop(peer, lambda: self._router.forget(peer.identity))

    def close(self, linger_s: float = 1.0) -> None:
        """Flush what was sent, at most `linger_s`, and end the thread; idempotent."""
        if not self._closing.is_set():
            self._linger_s = linger_s
            self._closing.set()
            self._wakeup.set()
        self._thread.join(linger_s + _JOIN_S)
        self._wakeup.close()

    def _drop(self, peer: PeerId, drop: Callable[[], object]) -> None:
        """Hear nothing more of a peer from this moment on, whatever of it is queued or still arrives."""

        def drop_and_tell() -> None:
            drop()
            self._inbox.put(_Forgotten(peer))

        self._forgotten.add(peer)
        self._submit(drop_and_tell)

    def _decoded(self, peer: PeerId, frames: list[bytes]) -> Event:
        try:
            return Received(peer, decode(frames))
        except ProtocolError as error:
            logger.warning("%s broke the protocol and is dropped: %s", peer, error)
            failure = RemoteFailure.of(error)
            self._drop(peer, lambda: self._router.refuse(peer.identity, failure))
            return Lost(peer, f"it broke the protocol: {error}")

    def _submit(self, task: Callable[[], object]) -> None:
        if self._closing.is_set():
            message = "the control channel was closed"
            raise TransportClosedError(message, name=self.endpoint)
        self._tasks.append(task)
        self._wakeup.set()

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._router.socket, self._router.monitor.socket, self._wakeup.fd):
            poller.register(source, zmq.POLLIN)
        next_beat_s = time.monotonic()
        try:
            while not self._closing.is_set():
                poller.poll(millis_until(next_beat_s))
                self._turn()
                if time.monotonic() >= next_beat_s:
                    self._router.beat()
                    next_beat_s = time.monotonic() + self._beat_s
            self._turn()
        finally:
            self._router.close(self._linger_s)
            self._context.term()
            self._inbox.put(None)

    def _turn(self) -> None:
        self._wakeup.clear()
        while self._tasks:
            self._tasks.popleft()()
        self._router.pump()


def _bind(
    context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair, host: HostSettings
) -> tuple[zmq.Socket[bytes], str]:
    """Return the bound ROUTER socket and the endpoint to advertise."""
    told = host.require_advertised()
    socket = context.socket(zmq.ROUTER)
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
    socket.router_mandatory = True
    socket.ipv6 = ":" in host.bind_host
    socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.set_hwm(0)
    try:
        socket.bind(f"tcp://{bracketed(host.bind_host)}:{host.bind_port or '*'}")
    except zmq.ZMQError as error:
        socket.close(linger=0)
        port = f" port {host.bind_port}" if host.bind_port else ""
        message = f"cannot listen on {host.bind_host!r}{port}: {error}; set HEADRACE_BIND to a local address"
        raise ConfigError(message, name="HEADRACE_BIND") from error
    port = socket.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
    return socket, f"tcp://{bracketed(told)}:{port}"
