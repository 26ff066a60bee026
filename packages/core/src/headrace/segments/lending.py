"""Lending of host segments: the holder's socket thread, and how a peer on the same host borrows from it."""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from headrace.config import HostSettings
from headrace.errors import (
    ConfigError,
    ConnectError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from headrace.manifest import SegmentDescriptor
from headrace.segments.folders import HolderFolder
from headrace.segments.frames import BORROW, LENT, PROBE, REFUSED, Caller, Frame, close_all, take_frame
from headrace.segments.host import HostSegment, MappedSegment

_log = logging.getLogger(__name__)
_PEERCRED = struct.Struct("3i")
_MAX_CONNECTIONS = 256
_PROBE_BYTES = 32
_JOIN_S = 5.0


@dataclass
class _Client:
    socket: socket.socket
    buffer: bytearray = field(default_factory=bytearray)


class Lender:
    """Passes file descriptors of a holder's segments to processes of permitted users on the same host.

    Lives in the holder. Call order: 1. `start`. 2. `lend`, `withdraw`, from any thread. 3. `close`.
    One daemon thread serves all connections and waits for none of them: a peer can neither block nor kill it.
    """

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._lent: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._clients: dict[int, _Client] = {}
        self._thread: threading.Thread | None = None
        self._unix_socket = ""
        self._pid = 0

    @property
    def unix_socket(self) -> str:
        """Path of the socket; empty before `start`."""
        return self._unix_socket

    def start(self) -> Self:
        """Remove folders of dead holders, open the socket and serve it. Idempotent.

        Raises:
            ConfigError: The socket folder cannot be used.
        """
        if self._thread is not None:
            return self
        self._pid = os.getpid()
        self._folder = HolderFolder(self._settings)
        self._probe = HostSegment(_PROBE_BYTES, "headrace-probe")
        self._probe_content = secrets.token_bytes(_PROBE_BYTES)
        self._probe.tensor.numpy()[:] = bytearray(self._probe_content)
        self._listener = self._listen()
        self._wake, self._woken = socket.socketpair()
        self._unix_socket = str(self._folder.socket_path)
        self._thread = threading.Thread(target=self._serve, name="headrace-lender", daemon=True)
        self._thread.start()
        return self

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._folder.socket_path))
            self._folder.socket_path.chmod(0o600 if self._folder.mode == 0o700 else 0o666)
            listener.listen(128)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            self._probe.close()
            self._folder.remove()
            message = f"socket {self._folder.socket_path} cannot be opened: {error}; set HEADRACE_SOCKET_DIR"
            raise ConfigError(message, name="HEADRACE_SOCKET_DIR") from error
        return listener

    def lend(self, segment: HostSegment) -> SegmentDescriptor:
        """Let peers borrow `segment`; idempotent. The segment stays the caller's."""
        key = segment.descriptor.segment_id
        if segment.closed:
            raise LocalProtocolError(f"segment {key} is closed and cannot be lent", name=key)
        with self._lock:
            if key not in self._lent:
                self._lent[key] = os.dup(segment.fd)
        return segment.descriptor

    def withdraw(self, segment_id: str) -> None:
        """Lend a segment no longer; idempotent. Mappings that peers have stay valid."""
        with self._lock:
            fd = self._lent.pop(segment_id, None)
            if fd is not None:
                os.close(fd)

    def close(self) -> None:
        """Stop serving, withdraw everything, remove the socket; idempotent, and done when it returns to any caller."""
        with self._closing:
            thread, self._thread = self._thread, None
            if thread is not None and os.getpid() == self._pid:
                self._wake.send(b"x")
                thread.join(_JOIN_S)
                for end in (self._wake, self._woken, self._listener):
                    end.close()
                self._probe.close()
                self._folder.remove()
            for segment_id in list(self._lent):
                self.withdraw(segment_id)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while self._round(selector):
                pass
            for fd in list(self._clients):
                self._drop(selector, fd)

    def _round(self, selector: selectors.BaseSelector) -> bool:
        for key, _ in selector.select():
            if key.fileobj is self._woken:
                return False
            if key.fileobj is self._listener:
                self._accept(selector)
            elif key.fd in self._clients:
                self._read(selector, key.fd)
        return True

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("lending socket cannot accept: %s", error)
            if self._clients:
                self._drop(selector, next(iter(self._clients)))
            time.sleep(0.05)
            return
        connection.setblocking(False)
        uid = _peer_uid(connection)
        if uid not in self._settings.permitted_uids:
            reason = f"user {uid} is not permitted; add it to the holder's HEADRACE_PERMITTED_UIDS"
            _log.warning("lending socket: %s", reason)
            _send(connection, Frame(REFUSED, reason.encode()))
            connection.close()
            return
        if len(self._clients) >= _MAX_CONNECTIONS:
            self._drop(selector, next(iter(self._clients)))
        self._clients[connection.fileno()] = _Client(connection)
        selector.register(connection, selectors.EVENT_READ)

    def _read(self, selector: selectors.BaseSelector, fd: int) -> None:
        client = self._clients[fd]
        try:
            data = client.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.buffer += data
        if not data or not self._answer_all(client):
            self._drop(selector, fd)

    def _answer_all(self, client: _Client) -> bool:
        """Answer every complete request; False where the connection must end."""
        try:
            while (request := take_frame(client.buffer)) is not None:
                if not self._answer(client.socket, request):
                    return False
        except ProtocolError as error:
            _send(client.socket, Frame(REFUSED, str(error).encode()))
            return False
        return True

    def _answer(self, connection: socket.socket, request: Frame) -> bool:
        if request.kind == PROBE:
            return _send(connection, Frame(LENT, self._probe_content), self._probe.fd)
        if request.kind != BORROW:
            return _send(connection, Frame(REFUSED, b"unknown request %d" % request.kind))
        with self._lock:
            fd = self._lent.get(request.payload.decode("ascii", "replace"))
            if fd is not None:
                return _send(connection, Frame(LENT), fd)
        reason = b"the segment is not lent (any more); ask for a new manifest"
        return _send(connection, Frame(REFUSED, reason))

    def _drop(self, selector: selectors.BaseSelector, fd: int) -> None:
        client = self._clients.pop(fd)
        selector.unregister(client.socket)
        client.socket.close()


def probe(unix_socket: str, deadline_s: float) -> bool:
    """Return whether the holder's memory can be mapped here: it is on the same host and permits this user.

    False also where the socket cannot be reached or refuses; why is logged.

    Raises:
        TransferTimeoutError: Something listens but does not answer.
        RemoteProtocolError: Something else than a lender answers.
    """
    if not unix_socket:
        return False
    try:
        reply, fds = _call(unix_socket, Frame(PROBE), deadline_s)
    except ConnectError as error:
        _log.debug("not on the same host: %s", error)
        return False
    try:
        descriptor = SegmentDescriptor("probe", _PROBE_BYTES)
        with MappedSegment(fds[0], descriptor) as mapped:
            return mapped.tensor.numpy().tobytes() == reply.payload
    finally:
        close_all(fds)


def borrow(
    unix_socket: str, descriptor: SegmentDescriptor, deadline_s: float, *, writable: bool = False
) -> MappedSegment:
    """Map a segment that a holder on this host lends.

    Raises:
        ConnectError: No holder there, or it refuses: another user, a segment that it does not lend.
        TransferTimeoutError: The holder did not answer within the deadline.
        PeerLostError: The holder died meanwhile.
        RemoteProtocolError: The answer is not one of a lender, or the memory is not as announced.
    """
    _, fds = _call(unix_socket, Frame(BORROW, descriptor.segment_id.encode()), deadline_s)
    try:
        return MappedSegment(fds[0], descriptor, writable=writable)
    finally:
        close_all(fds)


def _call(unix_socket: str, request: Frame, deadline_s: float) -> tuple[Frame, list[int]]:
    caller = Caller(unix_socket, deadline_s)
    try:
        reply, fds = caller.call(request)
    finally:
        caller.close()
    if reply.kind == LENT and len(fds) == 1:
        return reply, fds
    close_all(fds)
    if reply.kind == REFUSED:
        reason = reply.payload.decode("utf-8", "replace")
        raise ConnectError(f"holder at {unix_socket} refuses: {reason}", name=unix_socket)
    message = f"holder at {unix_socket} answered with message {reply.kind} and {len(fds)} descriptors"
    raise RemoteProtocolError(message, name=unix_socket)


def _peer_uid(connection: socket.socket) -> int:
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    return int(_PEERCRED.unpack(packed)[1])


def _send(connection: socket.socket, frame: Frame, *fds: int) -> bool:
    """Send without waiting; False where the peer does not read, which ends the connection."""
    data = frame.encode()
    with suppress(OSError):
        return (
            socket.send_fds(connection, [data], fds) == len(data)
            if fds
            else connection.send(data) == len(data)
        )
    return False
