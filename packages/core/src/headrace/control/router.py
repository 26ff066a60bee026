"""The hub's I/O side: admits, hears and loses peers. Everything here runs on the hub's one thread."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from headrace.control.keys import TokenBook
from headrace.control.peers import Lost, PeerId
from headrace.control.signals import Monitor
from headrace.errors import ProtocolError, RemoteFailure, RemoteProtocolError
from headrace.wire import Heartbeat, HolderHello, MemberHello, ReceiverHello, Refused, decode, encode

logger = logging.getLogger(__name__)

HEARTBEAT_FRAMES = encode(Heartbeat())
_MAX_HELLO_BYTES = 64 << 10
_MAX_REFUSALS = 8

Arrival = tuple[PeerId, list[bytes]] | Lost


@dataclass(slots=True)
class _Peer:
    id: PeerId
    fd: int
    heard_s: float


class Router:
    """Peers of one ROUTER socket.

    A connection is followed by its file descriptor, which the monitor's events and every message carry. The
    kernel reuses numbers, so events that precede a message are always taken before the message.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        tokens: TokenBook,
        heartbeat_s: float,
        deliver: Callable[[Arrival], None],
    ) -> None:
        self.socket = socket
        self.monitor = Monitor(socket)
        self._tokens = tokens
        self._heartbeat_s = heartbeat_s
        self._deliver = deliver
        self._peers: dict[bytes, _Peer] = {}
        self._identity_of: dict[int, bytes] = {}
        self._open_fds: set[int] = set()
        self._refused: set[bytes] = set()
        self._refusals: deque[ProtocolError] = deque(maxlen=_MAX_REFUSALS)

    def pump(self) -> None:
        """Take what has arrived, then declare lost whose connection broke: last words come first."""
        broken = self._broken()
        while self.socket.poll(0, zmq.POLLIN):
            frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            broken += self._broken()
            self._hear(frames)
        for identity in broken:
            self.lose(identity, "its connection broke: the process ended or the network failed")
            self._refused.discard(identity)

    def beat(self) -> None:
        """Send a heartbeat to every peer and lose those that were silent for too long."""
        limit = time.monotonic() - self._heartbeat_s
        for identity, peer in list(self._peers.items()):
            if peer.heard_s < limit:
                self.lose(identity, f"nothing was heard from it for {self._heartbeat_s:g} s")
            else:
                self.send(identity, HEARTBEAT_FRAMES)

    def send(self, identity: bytes, frames: list[bytes]) -> None:
        """Send to an admitted peer; nothing happens where it is gone, but its last words are taken."""
        if identity in self._peers and not self._send(identity, frames):
            self.pump()
            if identity in self._peers:
                self.lose(identity, "it cannot be reached any more")

    def lose(self, identity: bytes, reason: str) -> None:
        """Forget a peer and tell the hub's user."""
        peer = self.forget(identity)
        if peer is not None:
            self._deliver(Lost(peer, reason))

    def forget(self, identity: bytes) -> PeerId | None:
        """Drop a peer without a word; what it still sends is ignored."""
        peer = self._peers.pop(identity, None)
        self._refused.add(identity)
        return peer.id if peer else None

    def refuse(self, identity: bytes, failure: RemoteFailure) -> None:
        """Tell a peer that it is not taken, and ignore it from now on."""
        self._send(identity, encode(Refused(failure)))
        self.forget(identity)

    def take_refusals(self) -> list[ProtocolError]:
        """Return why peers were refused since the last call; from any thread."""
        taken = []
        while self._refusals:
            taken.append(self._refusals.popleft())
        return taken

    def close(self, linger_s: float) -> None:
        """Close the socket after what was sent has left, at most `linger_s` later."""
        self.monitor.close()
        self.socket.close(linger=int(linger_s * 1000))

    def _send(self, identity: bytes, frames: list[bytes]) -> bool:
        try:
            self.socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.debug("peer %s: %s", identity.hex(), error)
            return False
        return True

    def _broken(self) -> list[bytes]:
        broken: list[bytes] = []
        for event, fd in self.monitor.drain():
            if event == zmq.EVENT_ACCEPTED:
                self._open_fds.add(fd)
            elif event == zmq.EVENT_DISCONNECTED:
                self._open_fds.discard(fd)
                identity = self._identity_of.pop(fd, None)
                if identity is not None:
                    broken.append(identity)
        return broken

    def _hear(self, frames: list[zmq.Frame]) -> None:
        identity, body = frames[0].bytes, frames[1:]
        peer = self._peers.get(identity)
        if peer is None:
            self._meet(identity, body)
            return
        peer.heard_s = time.monotonic()
        content = [frame.bytes for frame in body]
        if content != HEARTBEAT_FRAMES:
            self._deliver((peer.id, content))

    def _meet(self, identity: bytes, body: list[zmq.Frame]) -> None:
        """Admit or refuse a peer by its first message."""
        if identity in self._refused:
            return
        fd = int(body[0].get(zmq.SRCFD)) if body else -1
        self._identity_of[fd] = identity
        try:
            peer = self._admitted(identity, body)
        except ProtocolError as error:
            logger.warning("refused a peer of the control channel: %s", error)
            self._refusals.append(error)
            self.refuse(identity, RemoteFailure.of(error, phase="enrol"))
            return
        self._peers[identity] = _Peer(peer, fd, time.monotonic())
        self._deliver((peer, [frame.bytes for frame in body]))
        if fd not in self._open_fds:
            self.lose(identity, "its connection broke right after its hello")

    def _admitted(self, identity: bytes, body: list[zmq.Frame]) -> PeerId:
        if sum(len(frame) for frame in body) > _MAX_HELLO_BYTES:
            message = f"its first message is longer than {_MAX_HELLO_BYTES} bytes; a hello must come first"
            raise RemoteProtocolError(message)
        hello = decode([frame.bytes for frame in body])
        if not isinstance(hello, ReceiverHello | HolderHello | MemberHello):
            message = f"its first message is a {type(hello).__name__}; a hello must come first"
            raise RemoteProtocolError(message)
        label = _label(hello)
        if not self._tokens.spend(hello.token):
            message = (
                f"{label} presented a token that is not valid (any more): its update is over, it "
                "was used by as many peers as were expected, or is wrong; start a new update"
            )
            raise RemoteProtocolError(message)
        return PeerId(identity, label)


def _label(hello: ReceiverHello | HolderHello | MemberHello) -> str:
    if isinstance(hello, ReceiverHello):
        return f"receiver {hello.worker}"
    return f"member {hello.name}" if isinstance(hello, MemberHello) else f"holder {hello.index}"
