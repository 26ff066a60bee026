"""What TCP peers say to each other before and between bytes of segments.

    server: greeting   magic 4s | version u16 | nonce 32s                             little-endian
    client: answer     magic 4s | version u16 | nonce 32s | HMAC(secret, client purpose, both nonces)
    server: proof      HMAC(secret, server purpose, both nonces)
    client: request    kind u8 | body length u32 | body
    server: reply      status u8 | length u64 | rows packed in order (a read), or the reason (a refusal)

The secret never travels, so who only listens cannot dial; the bytes themselves are not encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import (
    ConnectError,
    PeerLostError,
    RemoteProtocolError,
    TransportError,
    VersionSkewError,
)
from headrace.transports.rows import Rows

VERSION = 1
OPEN, READ = 1, 2
GRANTED, REFUSED = 0, 1
MAX_REASON_BYTES = 4096
MAX_REQUEST_BYTES = 256 << 20
MAX_NDIM = 32

_MAGIC = b"HRTC"
_GREETING = struct.Struct("<4sH32s")
_ANSWER = struct.Struct("<4sH32s32s")
_REQUEST = struct.Struct("<BI")
_REPLY = struct.Struct("<BQ")
_COUNTS = struct.Struct("<HIB")
_TEXT = struct.Struct("<H")
_PROOF_BYTES = 32
_CLIENT, _SERVER = b"headrace tcp client 1", b"headrace tcp server 1"
_MAX_BUFFERS = 512


class Line:
    """A connected socket that sends and receives exactly, and raises this package's errors.

    Args:
        connection: Connected; the line's from now on.
        peer: Who is at the other end, for messages.
        silence_s: A peer that takes or gives nothing for so long is lost.

    Attributes:
        introduced: Whether the handshake is done.
    """

    def __init__(self, connection: socket.socket, peer: str, silence_s: float) -> None:
        connection.settimeout(silence_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = connection
        self._silence_s = silence_s
        self.peer = peer
        self.introduced = False

    def limit(self, seconds: float | None = None) -> None:
        """Let each step take `seconds`; None restores the limit of silence."""
        self._socket.settimeout(self._silence_s if seconds is None else max(seconds, 1e-3))

    def send(self, views: Sequence[memoryview | bytes]) -> None:
        """Send all bytes of all views, in order."""
        pending = [memoryview(view) for view in views if len(view)]
        try:
            while pending:
                _advance(pending, self._socket.sendmsg(pending[:_MAX_BUFFERS]))
        except OSError as error:
            raise self._lost(error) from error

    def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fill all views, in order."""
        pending = [view for view in views if len(view)]
        try:
            while pending:
                count = self._socket.recvmsg_into(pending[:_MAX_BUFFERS])[0]
                if not count:
                    raise self._lost(ConnectionResetError("it closed the connection"))
                _advance(pending, count)
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, num_bytes: int, deadline_s: float | None = None) -> bytes:
        """Return exactly `num_bytes`; all within `deadline_s` where given, however they trickle in."""
        end_s = None if deadline_s is None else time.monotonic() + deadline_s
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view.nbytes:
            if end_s is not None:
                self.limit(self._left(end_s))
            view = view[self._receive_some(view) :]
        return bytes(data)

    def healthy(self) -> bool:
        """Return whether an idle line may be used again: open, and nothing unasked for has come."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | select.POLLRDHUP)
        return not poller.poll(0)

    def abort(self) -> None:
        """Break the connection from any thread: whoever waits on it is woken."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._socket.close()

    def _left(self, end_s: float) -> float:
        left = end_s - time.monotonic()
        if left <= 0:
            raise self._lost(TimeoutError())
        return left

    def _receive_some(self, view: memoryview) -> int:
        try:
            count = self._socket.recv_into(view)
        except OSError as error:
            raise self._lost(error) from error
        if not count:
            raise self._lost(ConnectionResetError("it closed the connection"))
        return count

    def _lost(self, error: OSError) -> TransportError:
        return transport_error(error, self.peer)


def _advance(pending: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes of a list of views."""
    done = 0
    while done < len(pending) and count >= len(pending[done]):
        count -= len(pending[done])
        done += 1
    del pending[:done]
    if count:
        pending[0] = pending[0][count:]


def transport_error(error: OSError, peer: str, *, dialling: bool = False) -> TransportError:
    """Return the error of this package for what the system reported: the one place where they are mapped."""
    if dialling:
        message = (
            f"cannot connect to {peer}: {error}; is the holder running, is its address reachable from here?"
        )
        return ConnectError(message, name=peer, retryable=True)
    if isinstance(error, TimeoutError):
        return PeerLostError(
            f"{peer} took or gave nothing for too long; it hangs or the network is down", name=peer
        )
    return PeerLostError(f"{peer} broke the connection: {error}", name=peer)


def _proof(secret: bytes, purpose: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.new(secret, purpose + server_nonce + client_nonce, hashlib.sha256).digest()


def greet(line: Line, secret: bytes, deadline_s: float) -> None:
    """Server side of the handshake.

    Raises:
        ProtocolError: The client does not speak this protocol, or does not know the secret.
    """
    nonce = secrets.token_bytes(32)
    line.send([_GREETING.pack(_MAGIC, VERSION, nonce)])
    magic, version, client_nonce, proof = _ANSWER.unpack(line.receive(_ANSWER.size, deadline_s))
    _check_version(magic, version, line.peer)
    if not hmac.compare_digest(proof, _proof(secret, _CLIENT, nonce, client_nonce)):
        message = f"{line.peer} does not know this holder's secret"
        raise RemoteProtocolError(message, name=line.peer)
    line.send([_proof(secret, _SERVER, nonce, client_nonce)])


def introduce(line: Line, secret: bytes, deadline_s: float) -> None:
    """Client side of the handshake.

    Raises:
        ConnectError: The server closes the connection: the secret is not its own.
        ProtocolError: The server does not speak this protocol, or does not know the secret itself.
    """
    magic, version, nonce = _GREETING.unpack(line.receive(_GREETING.size, deadline_s))
    _check_version(magic, version, line.peer)
    own = secrets.token_bytes(32)
    line.send([_ANSWER.pack(_MAGIC, VERSION, own, _proof(secret, _CLIENT, nonce, own))])
    try:
        proof = line.receive(_PROOF_BYTES, deadline_s)
    except PeerLostError as error:
        message = (
            f"{line.peer} refuses this client: the secret is not its own (an old address), or it is full"
        )
        raise ConnectError(message, name=line.peer) from error
    if not hmac.compare_digest(proof, _proof(secret, _SERVER, nonce, own)):
        message = f"{line.peer} does not know the secret: something else listens at this address"
        raise RemoteProtocolError(message, name=line.peer)
    line.introduced = True


def _check_version(magic: bytes, version: int, peer: str) -> None:
    if magic != _MAGIC:
        message = f"{peer} does not speak Headrace's data protocol"
        raise RemoteProtocolError(message, name=peer)
    if version != VERSION:
        message = f"{peer} speaks data protocol {version}, this side {VERSION}; install equal versions"
        raise VersionSkewError(message, name=peer)


def send_request(line: Line, kind: int, body: bytes) -> None:
    """Send one request."""
    line.send([_REQUEST.pack(kind, len(body)), body])


def receive_request(line: Line, idle_s: float, body_s: float) -> tuple[int, bytes]:
    """Return the next request's kind and body.

    Raises:
        RemoteProtocolError: It is longer than any real one.
    """
    line.limit(idle_s)
    head = line.receive(1)
    kind, length = _REQUEST.unpack(head + line.receive(_REQUEST.size - 1, body_s))
    if length > MAX_REQUEST_BYTES:
        message = (
            f"{line.peer} announces a request of {length} bytes; at most {MAX_REQUEST_BYTES} are allowed"
        )
        raise RemoteProtocolError(message, name=line.peer)
    body = line.receive(length, body_s)
    line.limit()
    return kind, body


def send_granted(line: Line, length: int) -> None:
    """Tell that `length` bytes follow (a read), or that a segment has so many (an open)."""
    line.send([_REPLY.pack(GRANTED, length)])


def send_refusal(line: Line, reason: str) -> None:
    """Tell why a request is not granted."""
    text = reason.encode()[:MAX_REASON_BYTES]
    line.send([_REPLY.pack(REFUSED, len(text)), text])


def receive_reply(line: Line) -> int:
    """Return the length that the server granted.

    Raises:
        RemoteProtocolError: It refused, or its reply is malformed.
    """
    status, length = _REPLY.unpack(line.receive(_REPLY.size))
    if status == GRANTED:
        return int(length)
    if status != REFUSED or length > MAX_REASON_BYTES:
        message = (
            f"{line.peer} sent a reply of status {status} and {length} bytes, which is none of this protocol"
        )
        raise RemoteProtocolError(message, name=line.peer)
    reason = line.receive(length).decode("utf-8", "replace")
    raise RemoteProtocolError(f"{line.peer} refused: {reason}", name=line.peer)


@dataclass(frozen=True)
class ReadRequest:
    """Rows to read; `rows.block` indexes `segment_ids`."""

    segment_ids: tuple[str, ...]
    rows: Rows

    def encode(self) -> bytes:
        """Return the body of a `READ` request."""
        names = [name.encode() for name in self.segment_ids]
        head = [_COUNTS.pack(len(names), len(self.rows), self.rows.shape.shape[1])]
        texts = [_TEXT.pack(len(name)) + name for name in names]
        columns = [np.ascontiguousarray(getattr(self.rows, name), kind).tobytes() for name, kind in _COLUMNS]
        return b"".join(head + texts + columns)

    @classmethod
    def decode(cls, body: bytes) -> ReadRequest:
        """Return the request in `body`; sizes are checked, meanings are not.

        Raises:
            RemoteProtocolError: It is damaged.
        """
        try:
            num_segments, num_rows, ndim = _COUNTS.unpack_from(body)
            names, offset = _take_texts(body, _COUNTS.size, num_segments)
            columns: list[Any] = []
            for name, kind in _COLUMNS:
                shape = (num_rows, ndim) if name in {"strides", "shape"} else (num_rows,)
                column = np.frombuffer(body, kind, int(np.prod(shape)), offset).reshape(shape)
                offset += column.nbytes
                columns.append(column)
        except (struct.error, ValueError, UnicodeDecodeError) as error:
            raise RemoteProtocolError(f"damaged read request: {error}") from error
        if offset != len(body) or not 1 <= ndim <= MAX_NDIM:
            message = f"damaged read request: {len(body)} bytes, expected {offset}, {ndim} dims"
            raise RemoteProtocolError(message)
        return cls(names, Rows(*columns))


_COLUMNS = (("block", "<i4"), ("base", "<i8"), ("strides", "<i8"), ("shape", "<i8"), ("dtype", "|u1"))


def _take_texts(body: bytes, offset: int, count: int) -> tuple[tuple[str, ...], int]:
    names = []
    for _ in range(count):
        (length,) = _TEXT.unpack_from(body, offset)
        offset += _TEXT.size
        names.append(body[offset : offset + length].decode())
        offset += length
    return tuple(names), offset
