"""The holder's data server: packed reads of its segments over TCP, for whoever knows the secret."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np
import torch

from headrace.config import HostSettings, bracketed
from headrace.errors import (
    ConfigError,
    HeadraceError,
    PeerLostError,
    PlanError,
    ProtocolError,
)
from headrace.geometry import dense_strides
from headrace.plan import CopyTable
from headrace.transports.program import CopyProgram
from headrace.transports.rows import Rows, batches, cut_rows, joined_spans, packed_bases
from headrace.transports.tcp_frames import (
    OPEN,
    READ,
    Line,
    ReadRequest,
    greet,
    receive_request,
    send_granted,
    send_refusal,
)

logger = logging.getLogger(__name__)

_PACK_BYTES = 4 << 20
_GREET_S = 10.0
_BODY_S = 30.0
_IDLE_S = 3600.0
_SILENCE_S = 60.0
_MAX_CONNECTIONS = 1024
_MAX_READ_BYTES = 1 << 42
_JOIN_S = 5.0

SegmentLookup = Callable[[str], "torch.Tensor | None"]


class TcpServer:
    """Serves reads of a holder's segments. The constructor binds and starts listening.

    One daemon thread per connection. A client that stalls, sends garbage or asks for what lies outside a
    segment loses its connection or its request; nothing else is touched. Where there are too many connections, the
    one that has asked for nothing for longest gives way: clients dial again.

    Args:
        lookup: Returns the flat uint8 tensor of a segment id, or None; called from connection threads.
        secret: What clients must know; at least 16 bytes.
        host: Where to bind and what to advertise.

    Raises:
        ConfigError: The secret is too short, `bind_host` cannot be bound, or nobody named the address that peers dial.
    """

    def __init__(self, lookup: SegmentLookup, secret: bytes, host: HostSettings) -> None:
        if len(secret) < 16:
            message = f"the data server's secret has {len(secret)} bytes; at least 16 are needed"
            raise ConfigError(message, name="secret")
        self._lookup = lookup
        self._secret = secret
        self._lines: dict[Line, threading.Thread] = {}
        self._idle: dict[Line, None] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        told = host.require_advertised()
        self._listener = listen(host.bind_host)
        port = self._listener.getsockname()[1]
        self.endpoint = f"{bracketed(told)}:{port}"
        self._thread = threading.Thread(target=self._accept, name="headrace-tcp", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and break all connections; idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            logger.debug("listener of %s: %s", self.endpoint, error)
        self._thread.join(_JOIN_S)
        self._listener.close()
        with self._lock:
            running = dict(self._lines)
        for line in running:
            line.abort()
        for thread in running.values():
            thread.join(_JOIN_S)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    logger.warning("data server %s cannot accept: %s", self.endpoint, error)
                    time.sleep(0.05)
                continue
            self._start(connection, f"client {address[0]}:{address[1]}")

    def _start(self, connection: socket.socket, peer: str) -> None:
        with self._lock:
            full = not self._make_room()
            if not full:
                line = Line(connection, peer, _SILENCE_S)
                thread = threading.Thread(
                    target=self._serve, args=(line,), name="headrace-tcp-read", daemon=True
                )
                self._lines[line] = thread
        if full:
            logger.warning(
                "data server %s has %d busy clients and drops %s", self.endpoint, _MAX_CONNECTIONS, peer
            )
            connection.close()
            return
        thread.start()

    def _make_room(self) -> bool:
        """Return whether one more connection may begin, with the lock held; an idle one is broken for it."""
        if len(self._lines) < _MAX_CONNECTIONS:
            return True
        line = next(iter(self._idle), None)
        if line is None:
            return False
        del self._idle[line], self._lines[line]
        line.abort()
        return True

    def _serve(self, line: Line) -> None:
        """Handshake, then answer requests until the client leaves: the boundary of one connection."""
        try:
            greet(line, self._secret, _GREET_S)
            line.limit()
            packer = _Packer(line)
            while not self._closing.is_set():
                self._answer(line, packer, *self._next_request(line))
        except PeerLostError as error:
            logger.debug("data server %s: %s", self.endpoint, error)
        except (HeadraceError, RuntimeError, MemoryError) as error:
            logger.warning("data server %s drops %s: %s", self.endpoint, line.peer, error)
        finally:
            line.close()
            with self._lock:
                self._lines.pop(line, None)
                self._idle.pop(line, None)

    def _next_request(self, line: Line) -> tuple[int, bytes]:
        with self._lock:
            self._idle[line] = None
        request = receive_request(line, _IDLE_S, _BODY_S)
        with self._lock:
            self._idle.pop(line, None)
        return request

    def _answer(self, line: Line, packer: _Packer, kind: int, body: bytes) -> None:
        if kind == OPEN:
            self._answer_open(line, body)
        elif kind == READ:
            self._answer_read(line, packer, body)
        else:
            send_refusal(line, f"unknown request {kind}")

    def _answer_open(self, line: Line, body: bytes) -> None:
        segment = self._lookup(body.decode("utf-8", "replace"))
        if segment is None:
            send_refusal(line, "the segment is not held (any more); ask for a new manifest")
        else:
            send_granted(line, segment.numel())

    def _answer_read(self, line: Line, packer: _Packer, body: bytes) -> None:
        try:
            request = ReadRequest.decode(body)
            blocks = [self._segment(name) for name in request.segment_ids]
            request.rows.check([block.numel() for block in blocks], "source")
            _check_total(request.rows)
        except (ProtocolError, PlanError) as error:
            logger.warning("data server %s refuses %s: %s", self.endpoint, line.peer, error)
            send_refusal(line, str(error))
            return
        send_granted(line, int(request.rows.num_bytes.sum()))
        packer.send(request.rows, blocks)

    def _segment(self, segment_id: str) -> torch.Tensor:
        found = self._lookup(segment_id)
        if found is None:
            message = f"segment {segment_id} is not held (any more); ask for a new manifest"
            raise PlanError(message, name=segment_id)
        return found


class _Packer:
    """Sends rows of segments: dense ones from where they lie, strided ones through one buffer."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._buffer: torch.Tensor | None = None

    def send(self, rows: Rows, blocks: list[torch.Tensor]) -> None:
        copies = _cut_strided(rows)
        rows = Rows.sources(copies)
        memory = [memoryview(block.numpy()) for block in blocks]  # type: ignore[arg-type]
        num_bytes = rows.num_bytes
        for dense, part in batches(rows.dense, num_bytes, _PACK_BYTES):
            if dense:
                spans = joined_spans(rows.block[part], rows.base[part], num_bytes[part])
                self._line.send([memory[block][begin:end] for block, begin, end in spans])
            else:
                self._line.send([self._packed(copies.take(part), blocks)])

    def _packed(self, copies: CopyTable, blocks: list[torch.Tensor]) -> memoryview:
        if self._buffer is None:
            self._buffer = torch.empty(_PACK_BYTES, dtype=torch.uint8)
        sizes = Rows.sources(copies).num_bytes
        CopyProgram(_packing(copies, sizes), blocks, [self._buffer]).run()
        return memoryview(self._buffer.numpy())[: int(sizes.sum())]  # type: ignore[arg-type]


def _packing(copies: CopyTable, sizes: np.ndarray) -> CopyTable:
    rows = Rows.sources(copies)
    none = np.zeros(len(copies), np.int32)
    packed = dense_strides(rows.shape, rows.itemsize)
    return CopyTable(
        rows.block,
        rows.base,
        rows.strides,
        none,
        packed_bases(sizes),
        packed,
        rows.shape,
        rows.dtype,
        rows.dtype,
    )


def _cut_strided(rows: Rows) -> CopyTable:
    """Return the rows as copies, strided ones cut to the size of the buffer."""
    none, wide = np.zeros(len(rows), np.int32), np.zeros_like(rows.strides)
    copies = CopyTable(
        rows.block,
        rows.base,
        rows.strides,
        none,
        np.zeros(len(rows), np.int64),
        wide,
        rows.shape,
        rows.dtype,
        rows.dtype,
    )
    return cut_rows(copies, _PACK_BYTES, ~rows.dense)


def _check_total(rows: Rows) -> None:
    total = rows.num_bytes.astype(np.float64).sum()
    if total > _MAX_READ_BYTES:
        message = f"one read of {total:.3g} bytes is too long; at most {_MAX_READ_BYTES} are served"
        raise PlanError(message)


def listen(bind_host: str) -> socket.socket:
    """Listen on a free port of an address, of all of IPv4 where that is `*`.

    Raises:
        ConfigError: `bind_host` cannot be bound.
    """
    family = socket.AF_INET6 if ":" in bind_host else socket.AF_INET
    try:
        return socket.create_server(("" if bind_host == "*" else bind_host, 0), family=family, backlog=128)
    except OSError as error:
        message = f"cannot listen on {bind_host!r}: {error}; set HEADRACE_BIND to a local address"
        raise ConfigError(message, name="HEADRACE_BIND") from error
