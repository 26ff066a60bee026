"""Reads from a holder over TCP: the route that always works."""

from __future__ import annotations

import itertools
import socket
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from headrace.errors import (
    ConnectError,
    PeerLostError,
    RemoteProtocolError,
)
from headrace.geometry import dense_strides
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.plan import CopyTable
from headrace.transports.jobs import ReadBoard
from headrace.transports.program import CopyProgram, is_flat, real_copies
from headrace.transports.rows import Mask, Rows, batches, cut_rows, joined_spans, packed_bases
from headrace.transports.tcp_frames import (
    OPEN,
    READ,
    Line,
    ReadRequest,
    introduce,
    receive_reply,
    send_request,
    transport_error,
)

_CONNECTIONS_PER_HOLDER = 4
_MAX_READERS = 16
_LEAST_PART_BYTES = 16 << 20
_UNPACK_BYTES = 4 << 20
_DIAL_S = 10.0
_SILENCE_S = 60.0


class TcpTransport:
    """Reads packed rows from holders' data servers, over a few connections that are kept.

    Bytes land where they belong without a copy where the destination is dense host memory of the same dtype;
    elsewhere they pass one small buffer. Nothing is encrypted: use it inside a network that you trust.
    """

    def __init__(self) -> None:
        self._holder_of: dict[str, HolderAddress] = {}
        self._idle: dict[HolderAddress, list[Line]] = defaultdict(list)
        self._board = ReadBoard("tcp", _MAX_READERS)

    @property
    def name(self) -> str:
        """`tcp`."""
        return "tcp"

    def open(self, holder: HolderAddress, segment: SegmentDescriptor, deadline_s: float) -> None:
        """Ask the holder whether it has the segment."""
        with self._board.lock:
            self._board.check_open()
            if self._holder_of.get(segment.segment_id) == holder:
                return
        line = self._line(holder, deadline_s)
        try:
            _introduce(line, holder, deadline_s)
            line.limit(deadline_s)
            send_request(line, OPEN, segment.segment_id.encode())
            held = receive_reply(line)
        except (PeerLostError, RemoteProtocolError) as error:
            line.close()
            message = f"segment {segment.segment_id} cannot be read from holder {holder.holder_id}: {error}"
            raise ConnectError(message, name=segment.segment_id) from error
        except BaseException:
            line.close()
            raise
        self._give_back(holder, line)
        if held != segment.num_bytes:
            message = (
                f"segment {segment.segment_id} has {held} bytes at holder {holder.holder_id}, announced are "
                f"{segment.num_bytes}; ask for a new manifest"
            )
            raise ConnectError(message, name=segment.segment_id)
        with self._board.lock:
            self._holder_of[segment.segment_id] = holder

    def retain(self, segment_ids: Collection[str]) -> None:
        """Forget all other segments, and connections to holders that have none left."""
        with self._board.lock:
            for gone in self._holder_of.keys() - set(segment_ids):
                del self._holder_of[gone]
            for holder in self._idle.keys() - set(self._holder_of.values()):
                for line in self._idle.pop(holder):
                    line.close()

    def submit(
        self, copies: CopyTable, segments: Sequence[SegmentDescriptor], blocks: Sequence[torch.Tensor]
    ) -> int:
        """Start reading in background threads.

        Raises:
            PlanError: A copy reaches outside its memory.
            LocalProtocolError: A segment was not opened.
        """
        holders = [self._board.find(self._holder_of, segment.segment_id) for segment in segments]
        copies = real_copies(copies, segments, blocks)
        job = _Job(self._board)
        for holder in dict.fromkeys(holders):
            mine = np.array([other == holder for other in holders])
            for part in _parts(copies.take(mine[copies.src_block])):
                job.reads.append(_Read(holder, part, segments, blocks))
        return self._board.start(job, [partial(self._run, job, read) for read in job.reads])

    def wait(self, job: int, deadline_s: float) -> None:
        """Wait for a job; on any error its connections are broken, so that nothing lands afterwards.

        Raises:
            LocalProtocolError: There is no such job, or it was waited for before.
            RemoteProtocolError: The holder does not hold a segment any more.
        """
        self._board.wait(job, deadline_s)

    def close(self) -> None:
        """Break all connections and end all reads; idempotent."""
        self._board.close()
        with self._board.lock:
            idle = [line for lines in self._idle.values() for line in lines]
            self._idle.clear()
        for line in idle:
            line.close()
        self._board.join()

    def _line(self, holder: HolderAddress, deadline_s: float) -> Line:
        with self._board.lock:
            self._board.check_open()
            idle = self._idle[holder]
            while idle:
                line = idle.pop()
                if line.healthy():
                    line.limit()
                    return line
                line.close()
        return _dial(holder, deadline_s)

    def _give_back(self, holder: HolderAddress, line: Line) -> None:
        with self._board.lock:
            if not self._board.closed and len(self._idle[holder]) < _CONNECTIONS_PER_HOLDER:
                self._idle[holder].append(line)
                return
        line.close()

    def _run(self, job: _Job, read: _Read) -> None:
        """Make one read: on a reader thread."""
        try:
            line = self._line(read.holder, _DIAL_S)
            with job.using(line):
                _introduce(line, read.holder, _DIAL_S)
                read.run(line)
        except ConnectError as error:
            message = f"holder {read.holder.holder_id} was lost: {error}"
            raise PeerLostError(message, name=read.holder.holder_id) from error
        self._give_back(read.holder, line)


class _Read:
    """One request and where its bytes go."""

    def __init__(
        self,
        holder: HolderAddress,
        copies: CopyTable,
        segments: Sequence[SegmentDescriptor],
        blocks: Sequence[torch.Tensor],
    ) -> None:
        self.holder = holder
        self._copies = copies
        self._blocks = blocks
        used, renumbered = np.unique(copies.src_block, return_inverse=True)
        rows = Rows.sources(copies)
        rows = Rows(renumbered.astype(np.int32), rows.base, rows.strides, rows.shape, rows.dtype)
        self._request = ReadRequest(tuple(segments[block].segment_id for block in used.tolist()), rows)

    def run(self, line: Line) -> None:
        """Ask, and receive everything to its place.

        Raises:
            PeerLostError: The holder died.
            RemoteProtocolError: It refused, for instance because a segment is released.
        """
        send_request(line, READ, self._request.encode())
        targets, sizes = Rows.destinations(self._copies), self._request.rows.num_bytes
        direct = self._direct(targets)
        granted, expected = receive_reply(line), int(sizes.sum())
        if granted != expected:
            message = f"{line.peer} announces {granted} bytes, asked for were {expected}"
            raise RemoteProtocolError(message, name=line.peer)
        memory = {
            block: _bytes_of(self._blocks[block]) for block in np.unique(targets.block[direct]).tolist()
        }
        buffer = torch.empty(0 if direct.all() else _UNPACK_BYTES, dtype=torch.uint8)
        for straight, part in batches(direct, sizes, _UNPACK_BYTES):
            if straight:
                spans = joined_spans(targets.block[part], targets.base[part], sizes[part])
                line.receive_into([memory[block][begin:end] for block, begin, end in spans])
            else:
                program = CopyProgram(_unpacking(self._copies.take(part)), [buffer], self._blocks)
                line.receive_into([_bytes_of(buffer)[: int(sizes[part].sum())]])
                program.run()

    def _direct(self, targets: Rows) -> Mask:
        """Return which rows may be received in place."""
        flat = np.array([is_flat(block) and block.device.type == "cpu" for block in self._blocks], bool)
        return np.asarray(targets.dense & (self._copies.src_dtype == targets.dtype) & flat[targets.block])


@dataclass
class _Job:
    """Reads under way, and the connections that they use."""

    board: ReadBoard
    reads: list[_Read] = field(default_factory=list)
    _lines: set[Line] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _aborted: bool = False

    @property
    def peers(self) -> str:
        """The holders' names."""
        return ", ".join(sorted({read.holder.holder_id for read in self.reads}))

    @contextmanager
    def using(self, line: Line) -> Iterator[None]:
        """Tie a connection to the job while the body runs; it is closed where the body fails."""
        with self._lock:
            if self._aborted:
                line.close()
                raise self.board.closed_error()
            self._lines.add(line)
        try:
            yield
        except BaseException:
            line.close()
            raise
        finally:
            with self._lock:
                self._lines.discard(line)

    def abort(self) -> None:
        """Break everything under way; what has not begun never begins."""
        with self._lock:
            self._aborted = True
            for line in self._lines:
                line.abort()


def _parts(copies: CopyTable) -> list[CopyTable]:
    """Cut one holder's copies into requests of about equal bytes, a connection each."""
    copies = cut_rows(copies, _UNPACK_BYTES)
    ends = np.cumsum(Rows.sources(copies).num_bytes)
    if not len(ends):
        return []
    count = int(np.clip(ends[-1] // _LEAST_PART_BYTES, 1, _CONNECTIONS_PER_HOLDER))
    bounds = np.searchsorted(ends, ends[-1] * np.arange(1, count) // count, side="left") + 1
    edges = np.unique([0, *bounds.tolist(), len(ends)]).tolist()
    return [copies.take(slice(begin, end)) for begin, end in itertools.pairwise(edges)]


def _unpacking(copies: CopyTable) -> CopyTable:
    """Return the copies with sources packed in one buffer, as they arrive."""
    rows = Rows.sources(copies)
    packed = dense_strides(rows.shape, rows.itemsize)
    return replace(
        copies,
        src_block=np.zeros(len(copies), np.int32),
        src_base=packed_bases(rows.num_bytes),
        src_strides=packed,
    )


def _bytes_of(block: torch.Tensor) -> memoryview:
    return memoryview(block.detach().numpy())  # type: ignore[arg-type]


def _dial(holder: HolderAddress, deadline_s: float) -> Line:
    """Return a connection without its handshake.

    Raises:
        ConnectError: Nothing listens there.
    """
    host, _, port = holder.tcp_endpoint.rpartition(":")
    peer = f"holder {holder.holder_id} at {holder.tcp_endpoint or '(no address)'}"
    if not port.isdigit():
        message = f"{peer} serves no tcp; its address must be HOST:PORT"
        raise ConnectError(message, name=holder.holder_id)
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=max(deadline_s, 1e-3))
    except (OSError, OverflowError) as error:
        raise transport_error(OSError(error), peer, dialling=True) from error
    return Line(connection, peer, _SILENCE_S)


def _introduce(line: Line, holder: HolderAddress, deadline_s: float) -> None:
    """Make the handshake on a fresh connection; nothing on one that has it behind.

    Raises:
        ConnectError: The holder refuses or does not answer.
        ProtocolError: Something else listens there, or another version.
    """
    if line.introduced:
        return
    try:
        introduce(line, holder.tcp_secret, deadline_s)
    except PeerLostError as error:
        message = f"{line.peer} does not answer as a holder: {error}"
        raise ConnectError(message, name=holder.holder_id) from error
    line.limit()
