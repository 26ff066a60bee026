"""Reads from a holder on the same host: its memory is mapped, copies read it in place."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import torch

from headrace.errors import ConnectError, LocalProtocolError, TransportClosedError
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.plan import CopyTable
from headrace.segments.cuda import MappedCudaSegment
from headrace.segments.host import MappedSegment
from headrace.segments.lending import borrow
from headrace.transports.landing import land
from headrace.transports.program import CopyProgram, real_copies


class MemoryTransport:
    """Maps segments and keeps the mappings over updates, by segment id.

    A mapping stays readable after its holder has died, so that a commit can be finished.
    """

    makes_pages = True

    def __init__(self) -> None:
        self._mapped: dict[str, MappedSegment | MappedCudaSegment] = {}
        self._lock = threading.Lock()
        self._jobs: set[int] = set()
        self._next_job = 0
        self._closed = False

    @property
    def name(self) -> str:
        """`memory`."""
        return "memory"

    def open(self, holder: HolderAddress, segment: SegmentDescriptor, deadline_s: float) -> None:
        """Map a segment; pages come in when they are read, see `mapping`."""
        with self._lock:
            self._check_open()
            if segment.segment_id in self._mapped:
                return
            if segment.kind == "cuda":
                self._mapped[segment.segment_id] = MappedCudaSegment(segment)
                return
            if not holder.unix_socket:
                message = f"holder {holder.holder_id} lends no memory; use the tcp transport"
                raise ConnectError(message, name=holder.holder_id)
            self._mapped[segment.segment_id] = borrow(holder.unix_socket, segment, deadline_s)

    def mapping(self, segment_id: str) -> MappedSegment | MappedCudaSegment:
        """Return the mapping of an opened segment; it stays the transport's.

        Raises:
            LocalProtocolError: It was not opened.
        """
        with self._lock:
            self._check_open()
            found = self._mapped.get(segment_id)
        if found is None:
            message = f"segment {segment_id} is not mapped; open it first"
            raise LocalProtocolError(message, name=segment_id)
        return found

    def mapped(self, segment_id: str) -> torch.Tensor:
        """Return an opened segment as a flat uint8 tensor; read-only.

        Raises:
            LocalProtocolError: It was not opened.
        """
        return self.mapping(segment_id).tensor

    def retain(self, segment_ids: Collection[str]) -> None:
        """Drop the mappings of all other segments; views of them stay valid."""
        with self._lock:
            for gone in self._mapped.keys() - set(segment_ids):
                self._mapped.pop(gone).close()

    def submit(
        self, copies: CopyTable, segments: Sequence[SegmentDescriptor], blocks: Sequence[torch.Tensor]
    ) -> int:
        """Make the copies now; `wait` then returns at once.

        Raises:
            PlanError: A copy reaches outside its memory.
            LocalProtocolError: A segment was not opened.
        """
        sources = [self.mapped(segment.segment_id) for segment in segments]
        if any(source.is_cuda for source in sources):
            CopyProgram(copies, sources, blocks).run()
        else:
            land(real_copies(copies, segments, blocks), sources, blocks)
        with self._lock:
            self._check_open()
            self._next_job += 1
            self._jobs.add(self._next_job)
            return self._next_job

    def wait(self, job: int, deadline_s: float) -> None:  # noqa: ARG002 - the copies were made in `submit`
        """Return at once.

        Raises:
            LocalProtocolError: There is no such job, or it was waited for before.
        """
        with self._lock:
            self._check_open()
            if job not in self._jobs:
                message = f"job {job} is unknown; each job is waited for once"
                raise LocalProtocolError(message)
            self._jobs.remove(job)

    def close(self) -> None:
        """Drop all mappings; idempotent."""
        with self._lock:
            self._closed = True
            while self._mapped:
                self._mapped.popitem()[1].close()

    def _check_open(self) -> None:
        if self._closed:
            message = "the memory transport was closed"
            raise TransportClosedError(message, name="memory")
