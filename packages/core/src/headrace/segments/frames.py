"""Frames of the lending socket: a fixed head, a short payload, file descriptors beside it.

    magic 4s | version u16 | kind u16 | payload length u32        little-endian

Requests: `PROBE` (empty), `BORROW` (segment id). Replies: `LENT` (one file descriptor; for a probe the
payload is the content of the probe memory), `REFUSED` (reason as text). A connection may carry many requests.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from dataclasses import dataclass

from headrace.errors import (
    ConnectError,
    PeerLostError,
    RemoteProtocolError,
    TransferTimeoutError,
    VersionSkewError,
)

MAGIC = b"HRSL"
VERSION = 1
HEAD = struct.Struct("<4sHHI")
MAX_PAYLOAD = 4096
MAX_FDS = 4

PROBE, BORROW, LENT, REFUSED = 1, 2, 16, 17


@dataclass(frozen=True, slots=True)
class Frame:
    """One message: its kind and payload."""

    kind: int
    payload: bytes = b""

    def encode(self) -> bytes:
        """Return the bytes that go over the socket."""
        return HEAD.pack(MAGIC, VERSION, self.kind, len(self.payload)) + self.payload


def take_frame(buffer: bytearray) -> Frame | None:
    """Remove and return the first frame of `buffer`; None while it is incomplete.

    Raises:
        RemoteProtocolError: The bytes are not a frame.
        VersionSkewError: They are a frame of another protocol version.
    """
    if buffer[: len(MAGIC)] != MAGIC[: len(buffer)]:
        raise RemoteProtocolError("the peer does not speak Headrace's lending protocol (wrong magic)")
    if len(buffer) < HEAD.size:
        return None
    _, version, kind, length = HEAD.unpack_from(buffer)
    if version != VERSION:
        message = f"the peer speaks lending protocol {version}, this side {VERSION}; install equal versions"
        raise VersionSkewError(message)
    if length > MAX_PAYLOAD:
        raise RemoteProtocolError(
            f"the peer announces a message of {length} bytes; at most {MAX_PAYLOAD} are allowed"
        )
    if len(buffer) < HEAD.size + length:
        return None
    payload = bytes(buffer[HEAD.size : HEAD.size + length])
    del buffer[: HEAD.size + length]
    return Frame(kind, payload)


class Caller:
    """The borrower's end of one connection; every wait ends at one deadline."""

    def __init__(self, path: str, deadline_s: float) -> None:
        self._path = path
        self._end = time.monotonic() + deadline_s
        self._socket = self._connect()

    def call(self, request: Frame) -> tuple[Frame, list[int]]:
        """Send a request and return the reply with its file descriptors, which are the caller's then."""
        fds: list[int] = []
        try:
            # A holder that refuses this user closes at once: its reply is already there though sending fails.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._arm()
                self._socket.sendall(request.encode())
            return self._receive(fds), fds
        except TimeoutError:
            close_all(fds)
            message = f"holder at {self._path} did not answer in time; it is busy or hangs"
            raise TransferTimeoutError(message, name=self._path, retryable=True) from None
        except OSError as error:
            close_all(fds)
            raise PeerLostError(
                f"holder at {self._path} broke the connection: {error}", name=self._path
            ) from error
        except BaseException:
            close_all(fds)
            raise

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _arm(self) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _receive(self, fds: list[int]) -> Frame:
        buffer = bytearray()
        while True:
            self._arm()
            data, received, _, _ = socket.recv_fds(
                self._socket, HEAD.size + MAX_PAYLOAD, MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
            fds += received
            if not data:
                message = f"holder at {self._path} closed the connection without an answer; it has died"
                raise PeerLostError(message, name=self._path, retryable=True)
            buffer += data
            frame = take_frame(buffer)
            if frame is not None:
                return frame

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._dial(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _dial(self, connection: socket.socket) -> None:
        """Connect; a full backlog answers at once with EAGAIN, so that is tried again until the deadline."""
        while True:
            left = self._end - time.monotonic()
            if left <= 0:
                message = f"holder at {self._path} did not accept in time; it is busy or hangs"
                raise TransferTimeoutError(message, name=self._path, retryable=True)
            connection.settimeout(left)
            try:
                connection.connect(self._path)
            except BlockingIOError:
                time.sleep(min(left, 0.005))
            except TimeoutError:
                continue
            except OSError as error:
                message = (
                    f"no holder at {self._path or '(no path)'}: {error.strerror or error}; it runs on "
                    "another host, has ended, or its HEADRACE_SOCKET_DIR is not visible here"
                )
                raise ConnectError(message, name=self._path, retryable=True) from error
            except ValueError as error:
                raise ConnectError(f"{self._path!r} is no socket path: {error}", name=self._path) from error
            else:
                return


def close_all(fds: list[int]) -> None:
    """Close file descriptors and forget them."""
    while fds:
        os.close(fds.pop())
