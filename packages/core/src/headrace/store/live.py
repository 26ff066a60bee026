"""A trainer's weights in host memory: one version at a time, of which only what a plan uses is copied."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace

from headrace.config import Deadlines
from headrace.errors import HeadraceError, LocalProtocolError, TransferTimeoutError
from headrace.geometry import RegionTable
from headrace.manifest import HolderAddress, Manifest
from headrace.protocols import DeviceReads, Slot, SourceRegion, SteppedSource
from headrace.segments import HostSegment, Lender, host_segments
from headrace.segments.pinning import PinnedRange
from headrace.store.layout import SEGMENT_BYTES, Layout
from headrace.store.reading import Progress
from headrace.store.single import SingleVersion
from headrace.store.store import PublishedVersion
from headrace.types import ParamTable

_log = logging.getLogger(__name__)
_MAX_THREADS = 4
_TICK_S = 0.1
_SETTLE_S = 10.0
_in_flight: list[object] = []  # memory that a GPU did not stop writing to; kept as long as the process


class LiveStore(SingleVersion[HostSegment]):
    """Places a version, then fills it with the weights of one step; has the calls of Store that a holder needs.

    Its segments are the only copy, taken over by every version: nobody may read one when the next is filled, which is
    so where updates follow one another. Memory that no plan uses is never touched. Where the source lies on a GPU, they
    are page-locked once, and the GPU writes into them by itself.

    Call order: 1. `publish`. 2. `fill`, again where it raised. 3. `manifest`, `tensors`. 4. `release` or 1. 5. `close`.

    Args:
        source: One rank of a trainer; the caller's to close.
        holder_name: Unique name of this holder.
        lender: Lends the segments to peers of the same host, if given.
        segment_bytes: Most bytes per segment; a larger region gets a segment of its own.
    """

    def __init__(
        self,
        source: SteppedSource,
        holder_name: str,
        *,
        lender: Lender | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        super().__init__(holder_name)
        self._source = source
        self._lender = lender
        self._segment_bytes = segment_bytes
        self._layout: Layout | None = None
        self._regions = RegionTable.empty()
        self._pinned: list[PinnedRange] | None = None
        self._reads: DeviceReads | None = None
        self._newest = -1

    def publish(
        self,
        version: int,
        progress: Progress | None = None,  # noqa: ARG002 - as Store's
        deadline_s: float = 0.0,  # noqa: ARG002
    ) -> PublishedVersion:
        """Say where everything of a version will lie; nothing is copied.

        Raises:
            LocalProtocolError: The version does not grow beyond those that were filled.
            CapacityError: Not enough host memory.
        """
        self._check_grows(version, self._newest)
        layout = self._place()
        if self._pinned is None and getattr(self._source, "on_gpu", False):
            self._pin()
        descriptors = tuple(segment.descriptor for segment in self._segments)
        manifest = Manifest(HolderAddress(self._name), version, layout.params, descriptors, self._regions)
        self._published = PublishedVersion(version, manifest, layout.num_bytes, 0.0)
        return self._published

    def _place(self) -> Layout:
        params, regions = self._source.metadata(), tuple(self._source.regions())
        known = self._layout
        if known is not None and known.regions == regions and known.params == params:
            return known
        self._drop()
        layout = _aliased(params, regions, self._source.aliases(), self._segment_bytes)
        self._segments = tuple(host_segments(layout.segment_bytes, f"headrace-{self._name}"))
        for segment in self._segments:
            if self._lender is not None:
                self._lender.lend(segment)
        self._layout, self._regions = layout, layout.region_table()
        return layout

    def _pin(self) -> None:
        """Page-lock the segments for copies by GPUs, once; where that is not to be had, copies are slower."""
        self._pinned = []
        try:
            for segment in self._segments:
                address, size = segment.tensor.data_ptr(), segment.tensor.nbytes
                self._pinned.append(PinnedRange(address, size, chunk_bytes=size, writable=True))
        except HeadraceError as error:
            text = "holder %s copies from GPUs into pageable memory, at a fraction of the speed: %s"
            _log.warning(text, self._name, error)

    def fill(
        self,
        version: int,
        step: int,
        rows: Sequence[int],
        progress: Progress | None = None,
        deadline_s: float = Deadlines().read_s,
    ) -> None:
        """Copy the weights of `step` into the placed version, while training waits only before it changes them.

        Blocking; GPUs copy what they hold by themselves, a few threads the rest.

        Args:
            version: As placed.
            step: The trainer's step.
            rows: Rows of the manifest's regions to copy; the others keep whatever bytes they have.
            progress: Called from this thread with bytes copied and bytes in all.
            deadline_s: Limit for waiting and copying.

        Raises:
            StepMissedError: This rank cannot give that step.
            TransferTimeoutError: Copying took too long.
            LocalProtocolError: The version is not placed.
        """
        self._find(version)
        if self._layout is None:
            raise LocalProtocolError(f"holder {self._name} has no layout", name=self._name)
        end, slots = time.monotonic() + deadline_s, self._layout.slots
        chosen = replace(self._layout, slots=tuple(slots[row] for row in rows))
        with self._source.at(step, deadline_s) as reads, ExitStack() as stack:
            pool = stack.enter_context(_Readers())
            left = chosen if reads is None else self._submit(reads, chosen, end)
            pool.run(left, self._read, progress or _quiet, end)
            if reads is not None:
                reads.wait(end - time.monotonic())
                (progress or _quiet)(chosen.num_bytes, chosen.num_bytes)
        self._newest = version

    def _submit(self, reads: DeviceReads, chosen: Layout, end: float) -> Layout:
        """Have GPUs begin; returns what is left for the host."""
        self._reads = reads
        segments = [segment.tensor for segment in self._segments]
        return replace(chosen, slots=tuple(reads.submit(chosen.slots, segments, end - time.monotonic())))

    def _read(self, slot: Slot) -> None:
        if slot.num_bytes:
            place = self._segments[slot.segment].tensor[slot.begin : slot.begin + slot.num_bytes]
            self._source.read(SourceRegion(slot.region.name, slot.region.box), place.numpy().data)

    def release(self, version: int) -> None:
        """Forget a version that came to nothing, so that its number can be used again; idempotent."""
        if self._published is not None and self._published.version == version:
            self._published, self._newest = None, version - 1

    def close(self) -> None:
        """Give the memory back once no peer maps it; idempotent."""
        self._published = None
        self._drop()

    def _drop(self) -> None:
        if self._settled():
            for pinned in self._pinned or ():
                pinned.close()
        else:
            _in_flight.append(([segment.tensor for segment in self._segments], self._pinned))
        for segment in self._segments:
            if self._lender is not None:
                self._lender.withdraw(segment.descriptor.segment_id)
            segment.close()
        self._segments, self._pinned, self._layout = (), None, None

    def _settled(self) -> bool:
        """Wait until no GPU writes into the segments any more; False where that does not end."""
        reads, self._reads = self._reads, None
        try:
            if reads is not None:
                reads.wait(_SETTLE_S)
        except (HeadraceError, RuntimeError) as error:  # a deadline, or the GPU is lost
            _log.warning("holder %s keeps its memory, as a GPU still writes to it: %s", self._name, error)
            return False
        return True


def _aliased(
    params: ParamTable, regions: tuple[SourceRegion, ...], aliases: Mapping[int, int], limit: int
) -> Layout:
    """Place regions, those that are one memory in one place."""
    own = [i for i in range(len(regions)) if i not in aliases]
    layout = Layout.of(params, [regions[i] for i in own], limit)
    slots = dict(zip(own, layout.slots, strict=True))
    placed = tuple(replace(slots[aliases.get(i, i)], region=region) for i, region in enumerate(regions))
    return replace(layout, regions=regions, slots=placed)


def _quiet(_done_bytes: int, _total_bytes: int) -> None:
    pass


class _Readers:
    """A few threads that copy slots; leaving the context waits for those at work, so that weights may change then."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._done_bytes = 0
        count = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(count, "headrace-read")

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def run(self, layout: Layout, read: Callable[[Slot], None], progress: Progress, end: float) -> None:
        """Copy every slot of `layout`; on the first failure the others stop after the slot they are at."""
        futures = [self._pool.submit(self._take, read, task) for task in layout.tasks(cut=True)]
        while futures:
            finished, left = wait(futures, timeout=_TICK_S, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            futures = list(left)
            progress(self._done_bytes, layout.num_bytes)
            if futures and time.monotonic() > end:
                message = f"copying stopped at {self._done_bytes} of {layout.num_bytes} bytes: the deadline has passed"
                raise TransferTimeoutError(message, phase="read", retryable=True)

    def _take(self, read: Callable[[Slot], None], task: Sequence[Slot]) -> None:
        for slot in task:
            if self._stop.is_set():
                return
            read(slot)
            with self._lock:
                self._done_bytes += slot.num_bytes
