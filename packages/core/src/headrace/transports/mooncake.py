"""Reads from holders through Mooncake: RDMA where there is RDMA, TCP elsewhere, in a process of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from headrace.config import HostSettings, host_settings
from headrace.errors import (
    ConnectError,
    PeerLostError,
    TransportClosedError,
)
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.plan import CopyTable
from headrace.segments import HostSegment
from headrace.segments.ahead import PagesAhead
from headrace.transports import mooncake_reader
from headrace.transports.jobs import ReadBoard
from headrace.transports.landing import land
from headrace.transports.mooncake_engine import missing
from headrace.transports.mooncake_process import Answer, HelperProcess
from headrace.transports.mooncake_reads import StagedReads, staged_reads
from headrace.transports.program import real_copies

logger = logging.getLogger(__name__)
SLOT_BYTES = 32 << 20
NUM_SLOTS = 6
LEAST_SLOTS = 3
_SLOT_S = 60.0
_Directory = Mapping[str, tuple[int, int]]
"""Address and size of each segment that a holder shows."""


class MooncakeTransport:
    """Reads ranges into staging memory in a helper process, and copies from there to where bytes belong.

    Mooncake's late bytes land only in staging. A slot whose read was given up is never used again; when few are left
    a new helper with new staging takes over, and the old one ends. Nobody is authenticated and nothing is encrypted:
    compare sums of what was read, and use it inside a network that you trust.

    Args:
        host: Address and NICs of this host; None reads the environment.
        slot_bytes: Most bytes of one batch.
    """

    makes_pages = True

    def __init__(self, host: HostSettings | None = None, slot_bytes: int = SLOT_BYTES) -> None:
        self._host = host or host_settings()
        self._slot_bytes = slot_bytes
        self._places: dict[str, tuple[str, int]] = {}
        self._directories: dict[str, _Directory] = {}
        self._board = ReadBoard("mooncake", NUM_SLOTS)
        self._staging: _Staging | None = None

    @staticmethod
    def missing() -> str:
        """Return why Mooncake cannot be used here, and the way out; empty where it can."""
        return missing()

    @property
    def name(self) -> str:
        """`mooncake`."""
        return "mooncake"

    def open(self, holder: HolderAddress, segment: SegmentDescriptor, deadline_s: float) -> None:
        """Find where the holder's helper has the segment: in its directory, which is read once until `retain`."""
        if not holder.mooncake:
            message = f"holder {holder.holder_id} runs no Mooncake helper; hold with --transport mooncake"
            raise ConnectError(message, name=holder.holder_id)
        with self._board.lock:
            self._board.check_open()
            if self._places.get(segment.segment_id, ("",))[0] == holder.mooncake:
                return
            known = self._directories.get(holder.mooncake, {})
        if segment.segment_id not in known:
            known = self._fresh_staging().helper.call({"session": holder.mooncake}, deadline_s)["segments"]
        place = known.get(segment.segment_id)
        if place is None or int(place[1]) != segment.num_bytes:
            there = (
                "does not show it" if place is None else f"has {place[1]} bytes of its {segment.num_bytes}"
            )
            message = (
                f"segment {segment.segment_id} cannot be read from holder {holder.holder_id}: it {there}"
            )
            raise ConnectError(message, name=segment.segment_id)
        with self._board.lock:
            self._directories[holder.mooncake] = known
            self._places[segment.segment_id] = (holder.mooncake, int(place[0]))

    def retain(self, segment_ids: Collection[str]) -> None:
        """Forget all other segments."""
        with self._board.lock:
            self._directories.clear()
            self._places = {name: place for name, place in self._places.items() if name in set(segment_ids)}

    def submit(
        self, copies: CopyTable, segments: Sequence[SegmentDescriptor], blocks: Sequence[torch.Tensor]
    ) -> int:
        """Start reading in background threads.

        Raises:
            PlanError: A copy reaches outside its memory.
            LocalProtocolError: A segment was not opened.
        """
        places = [self._board.find(self._places, segment.segment_id) for segment in segments]
        copies = real_copies(copies, segments, blocks)
        job = _Job(blocks)
        for session in dict.fromkeys(session for session, _ in places):
            mine = np.array([other == session for other, _ in places])
            for batch in staged_reads(copies.take(mine[copies.src_block]), self._slot_bytes):
                job.reads.append(_Read(session, batch, [address for _, address in places]))
        return self._board.start(job, [partial(self._run, job, read) for read in job.reads])

    def wait(self, job: int, deadline_s: float) -> None:
        """Wait for a job; after an error nothing of it lands in its blocks any more.

        Raises:
            LocalProtocolError: There is no such job, or it was waited for before.
        """
        self._board.wait(job, deadline_s)

    def close(self) -> None:
        """End the helper and all reads; idempotent."""
        self._board.close()
        with self._board.lock:
            staging, self._staging = self._staging, None
        if staging is not None:
            staging.close()
        self._board.join()

    def _fresh_staging(self) -> _Staging:
        """Return staging with enough slots that can still be used, with a new helper where there is none."""
        with self._board.lock:
            self._board.check_open()
            if self._staging is not None and self._staging.usable:
                return self._staging
            if self._staging is not None:
                logger.warning("too many reads through Mooncake were given up: a new helper takes over")
                self._staging.close()
            self._staging = _Staging(self._host, self._slot_bytes)
            return self._staging

    def _run(self, job: _Job, read: _Read) -> None:
        """Make one read: on a reader thread; again where the helper was replaced for reasons of others."""
        while True:
            staging = self._fresh_staging()
            try:
                staging.read(job, read)
            except PeerLostError:
                if not staging.closed or job.aborted:
                    raise
            else:
                return


@dataclass(frozen=True)
class _Read:
    """One batch from one holder."""

    session: str
    batch: StagedReads
    addresses: Sequence[int]

    def request(self, staging_offset: int) -> dict[str, object]:
        """Return what the helper is asked for."""
        ranges = self.batch.ranges
        peer = np.array(self.addresses, np.int64)[ranges[:, 0]] + ranges[:, 1]
        columns = np.stack([ranges[:, 2] + staging_offset, peer, ranges[:, 3]], axis=1)
        return {"session": self.session, "ranges": np.ascontiguousarray(columns).tobytes()}


class _Job:
    """Reads under way, and the blocks that they end in."""

    def __init__(self, blocks: Sequence[torch.Tensor]) -> None:
        self.blocks = blocks
        self.reads: list[_Read] = []
        self.aborted = False
        self._lock = threading.Lock()
        self._wakeups: set[threading.Event] = set()

    @property
    def peers(self) -> str:
        """The holders' helpers."""
        return ", ".join(sorted({read.session for read in self.reads}))

    def await_answer(self, answer: Future[Answer]) -> None:
        """Wait for the helper.

        Raises:
            HeadraceError: The read failed.
            TransportClosedError: The job was given up first; the read may still be at it.
        """
        wakeup = threading.Event()
        with self._lock:
            self._wakeups.add(wakeup)
            if self.aborted:
                wakeup.set()
        answer.add_done_callback(lambda _: wakeup.set())
        wakeup.wait()
        with self._lock:
            self._wakeups.discard(wakeup)
        if not answer.done():
            raise _closed()
        answer.result()

    @contextmanager
    def landing(self) -> Iterator[None]:
        """Let the body write into the blocks; not where the job was given up, and `abort` waits for its end."""
        with self._lock:
            if self.aborted:
                raise _closed()
            yield

    def abort(self) -> None:
        """Give all reads up; afterwards nothing is written into the blocks."""
        with self._lock:
            self.aborted = True
            for wakeup in self._wakeups:
                wakeup.set()


class _Staging:
    """A helper and the memory that it reads into, in slots. Slots whose read did not end well are never used again."""

    def __init__(self, host: HostSettings, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._segment = HostSegment(NUM_SLOTS * slot_bytes, "headrace-p2p", peers_write=True)
        settings = {
            "host": host.require_advertised(),
            "nics": list(host.mooncake_nics),
            "fd": self._segment.fd,
            "num_bytes": NUM_SLOTS * slot_bytes,
        }
        try:
            with PagesAhead([self._segment.tensor]):
                self.helper = HelperProcess(
                    mooncake_reader.__name__, settings, cpus=host.mooncake_cpus, pass_fds=[self._segment.fd]
                )
        except BaseException:
            self._segment.close()
            raise
        self._memory = self._segment.tensor
        self._free = list(reversed(range(NUM_SLOTS)))  # the first ones have their pages
        self._retired = 0
        self._changed = threading.Condition()
        self.closed = False

    @property
    def usable(self) -> bool:
        """Whether new reads may begin here."""
        return not self.closed and self.helper.alive and NUM_SLOTS - self._retired >= LEAST_SLOTS

    def read(self, job: _Job, read: _Read) -> None:
        """Read one batch into a slot, and copy it to where it belongs.

        Raises:
            PeerLostError: The peer or the helper is gone.
            TransportClosedError: The job was given up.
        """
        slot, good = self._take(), False
        try:
            job.await_answer(self.helper.submit(read.request(slot * self._slot_bytes)))
            good = True
            memory = self._memory[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]
            with job.landing():
                land(read.batch.copies, [memory], job.blocks)
        finally:
            with self._changed:
                if good:
                    self._free.append(slot)
                else:
                    self._retired += 1
                self._changed.notify()

    def _take(self) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: self._free or not self.usable, _SLOT_S) or not self._free:
                message = "no staging slot is left: too many reads through Mooncake were given up"
                raise PeerLostError(message, name="mooncake")
            return self._free.pop()  # the one used last: its bytes are in the CPU's cache

    def close(self) -> None:
        """End the helper: what was under way never lands; idempotent."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self.helper.close()
        self._segment.close()


def _closed() -> TransportClosedError:
    return TransportClosedError("the mooncake transport was closed", name="mooncake")
