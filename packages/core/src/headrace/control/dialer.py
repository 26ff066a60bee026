"""The far end of the control channel: a receiver or holder that dialled the coordinator."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from types import TracebackType
from typing import Self

import zmq

from headrace.control.keys import KeyPair
from headrace.control.signals import Monitor, Wakeup, millis_until
from headrace.errors import (
    ConfigError,
    ConnectError,
    PeerLostError,
    TransferTimeoutError,
    TransportClosedError,
    TransportError,
)
from headrace.wire import AnyMessage, Heartbeat, Message, Refused, decode, encode

_HEARTBEAT_FRAMES = encode(Heartbeat())
_MAX_FRAME_BYTES = 256 << 20
_RECONNECT_MS = 20
_JOIN_S = 10.0


class Dialer:
    """One connection to a `Hub`; the constructor dials in the background and returns at once.

    One daemon thread owns the socket and sleeps in poll between messages; `send` and `receive` may be called
    from any thread. The first message must be a hello. A lost connection is final: dial with a new object.

    Args:
        endpoint: The hub's `endpoint`.
        server_key: The hub's `server_key`.
        heartbeat_s: Silence after which the coordinator is lost.
        connect_s: Deadline for the connection and its handshake.

    Raises:
        ConfigError: The endpoint or key is malformed.
    """

    def __init__(
        self, endpoint: str, server_key: str, heartbeat_s: float = 10.0, connect_s: float = 10.0
    ) -> None:
        self.endpoint = endpoint
        self._heartbeat_s = heartbeat_s
        self._connect_s = connect_s
        self._beat_s = min(1.0, heartbeat_s / 4)
        self._inbox: queue.SimpleQueue[list[bytes] | TransportError] = queue.SimpleQueue()
        self._outbox: deque[list[bytes]] = deque()
        self._closing = threading.Event()
        self._linger_s = 0.0
        self._connected = False
        self._greeted = False
        self._heard_s = self._give_up_s = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._socket, self._monitor = _dial(self._context, endpoint, server_key)
        except ConfigError:
            self._context.term()
            raise
        self._wakeup = Wakeup()
        self._thread = threading.Thread(target=self._run, name="headrace-dialer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, message: Message) -> None:
        """Send in order, without blocking; nothing happens where the coordinator is lost: `receive` tells.

        Raises:
            TransportClosedError: `close` was called.
        """
        if self._closing.is_set():
            raise self._closed()
        self._outbox.append(encode(message))
        self._wakeup.set()

    def receive(self, deadline_s: float | None = None) -> AnyMessage:
        """Return the coordinator's next message; heartbeats are not shown.

        Without a deadline it still ends, as a silent coordinator is lost after `heartbeat_s`.

        Raises:
            TransferTimeoutError: Nothing came within the deadline.
            ConnectError: There was no connection within `connect_s`.
            PeerLostError: The connection broke, or the coordinator was silent for `heartbeat_s`.
            TransportClosedError: `close` was called.
            ProtocolError: The coordinator sent no valid message, or speaks another version.
            HeadraceError: The coordinator refused this peer; the error is the coordinator's.
        """
        try:
            arrival = self._inbox.get(timeout=None if deadline_s is None else max(0.0, deadline_s))
        except queue.Empty:
            message = f"the coordinator {self.endpoint} sent nothing within {deadline_s:g} s"
            raise TransferTimeoutError(message, name=self.endpoint, retryable=True) from None
        if isinstance(arrival, TransportError):
            self._inbox.put(arrival)
            raise type(arrival)(str(arrival), name=self.endpoint)
        said = decode(arrival)
        if isinstance(said, Refused):
            raise said.failure.to_error()
        return said

    def close(self, linger_s: float = 1.0) -> None:
        """Flush what was sent, at most `linger_s`, and end the thread; idempotent."""
        if not self._closing.is_set():
            self._linger_s = linger_s
            self._closing.set()
            self._wakeup.set()
        self._thread.join(linger_s + _JOIN_S)
        self._wakeup.close()

    def _closed(self) -> TransportClosedError:
        return TransportClosedError("this side closed its connection to the coordinator", name=self.endpoint)

    def _run(self) -> None:
        end: TransportError = self._closed()
        try:
            self._converse()
        except TransportError as error:
            end = error
        finally:
            self._inbox.put(end)
            self._monitor.close()
            self._socket.close(linger=int(self._linger_s * 1000) if self._connected else 0)
            self._context.term()

    def _converse(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._monitor.socket, self._wakeup.fd):
            poller.register(source, zmq.POLLIN)
        now = time.monotonic()
        self._heard_s, self._give_up_s, next_beat_s = now, now + self._connect_s, now
        while not self._closing.is_set():
            wake_s = next_beat_s if self._connected else self._give_up_s
            poller.poll(millis_until(wake_s))
            self._wakeup.clear()
            self._hear()
            self._say()
            self._check_silence()
            if self._connected and time.monotonic() >= next_beat_s:
                next_beat_s = time.monotonic() + self._beat_s
                self._beat()
        self._say()

    def _hear(self) -> None:
        """Take connection events, then messages: what came before a break is still delivered."""
        broken = False
        for event, _ in self._monitor.drain():
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected, self._heard_s = True, time.monotonic()
            broken = broken or (event == zmq.EVENT_DISCONNECTED and self._connected)
        while self._socket.poll(0, zmq.POLLIN):
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            self._heard_s = time.monotonic()
            if frames != _HEARTBEAT_FRAMES:
                self._inbox.put(frames)
        if broken:
            message = f"the connection to the coordinator {self.endpoint} broke: process or network failed"
            raise PeerLostError(message)

    def _say(self) -> None:
        while self._connected and self._outbox:
            if not self._greeted:
                self._greeted, self._heard_s = True, time.monotonic()
            self._socket.send_multipart(self._outbox.popleft(), zmq.NOBLOCK)

    def _beat(self) -> None:
        """Show life, but not before the hello: it must be the first message."""
        if self._greeted:
            self._socket.send_multipart(_HEARTBEAT_FRAMES, zmq.NOBLOCK)

    def _check_silence(self) -> None:
        now = time.monotonic()
        if not self._connected and now >= self._give_up_s:
            message = (
                f"no connection to the coordinator {self.endpoint} within {self._connect_s:g} s: either "
                "nothing listens there that this host can reach (check the coordinator's HEADRACE_BIND and "
                "HEADRACE_ADVERTISE), or the server key is not its own (an old ticket)"
            )
            raise ConnectError(message)
        if self._greeted and now - self._heard_s > self._heartbeat_s:
            message = f"the coordinator {self.endpoint} was silent for {self._heartbeat_s:g} s"
            raise PeerLostError(message)


def _dial(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, server_key: str
) -> tuple[zmq.Socket[bytes], Monitor]:
    """Return a DEALER that is connecting, watched from the beginning."""
    keys = KeyPair.new()
    socket = context.socket(zmq.DEALER)
    monitor = Monitor(socket)
    try:
        socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
        socket.curve_serverkey = server_key.encode()
        socket.ipv6 = "[" in endpoint
        socket.reconnect_ivl = _RECONNECT_MS
        socket.set(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
        socket.set_hwm(0)
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        monitor.close()
        socket.close(linger=0)
        message = f"cannot dial {endpoint!r} with key {server_key!r}: {error}"
        raise ConfigError(message, name=endpoint) from error
    return socket, monitor
