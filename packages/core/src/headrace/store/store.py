"""The Store: versions of a source's weights in host segments, at most two at a time."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch

from headrace.config import Deadlines
from headrace.errors import LocalProtocolError
from headrace.geometry import RegionTable
from headrace.manifest import HolderAddress, Manifest, SegmentDescriptor
from headrace.protocols import WeightSource
from headrace.segments import HostSegment, Lender, host_segments, require_memory
from headrace.store.layout import SEGMENT_BYTES, Layout
from headrace.store.reading import Progress, Reading

_log = logging.getLogger(__name__)
_MAX_THREADS = 8


def _silent(_done_bytes: int, _total_bytes: int) -> None:
    pass


@runtime_checkable
class BulkSource(Protocol):
    """A WeightSource that fills whole versions itself, in its own order and threads."""

    def fill(
        self, regions: RegionTable, blocks: Sequence[torch.Tensor], progress: Progress, deadline_s: float
    ) -> None:
        """Write everything that `regions()` lists to where `regions` places it in `blocks`. Blocking.

        After an error `blocks` are not used again, as late bytes may still land in them.
        """
        ...


@dataclass(frozen=True)
class PublishedVersion:
    """One complete version: everything of a Manifest but the holder's address.

    Attributes:
        version: Weight version.
        manifest: Manifest whose holder has only a name.
        num_bytes: Bytes of its regions.
        seconds: How long reading took.
    """

    version: int
    manifest: Manifest
    num_bytes: int
    seconds: float


class _SegmentSet:
    """Segments of one layout; holds one version at a time."""

    def __init__(self, layout: Layout, holder: str, lender: Lender | None) -> None:
        require_memory(sum(layout.segment_bytes), f"a version in holder {holder}")
        self.layout = layout
        self._lender = lender
        self._is_lent = False
        self.segments = host_segments(layout.segment_bytes, f"headrace-{holder}", sealed=False)
        self.regions = layout.region_table()

    @property
    def descriptors(self) -> tuple[SegmentDescriptor, ...]:
        return tuple(segment.descriptor for segment in self.segments)

    def lend(self) -> None:
        """Seal the segments and lend them, when they have been filled for the first time; idempotent."""
        if self._is_lent:
            return
        for segment in self.segments:
            segment.seal()
            if self._lender is not None:
                self._lender.lend(segment)
        self._is_lent = True

    @property
    def blocks(self) -> list[torch.Tensor]:
        return [segment.tensor for segment in self.segments]

    def close(self) -> None:
        for segment in self.segments:
            if self._lender is not None:
                self._lender.withdraw(segment.descriptor.segment_id)
            segment.close()


class Store:
    """Holds the newest versions of what one source's rank has. Lives in the holder.

    Two sets of segments take turns, so that segment ids stay the same over versions and peers keep their
    mappings. A version's bytes do not change until the version after next is published: that takes over its
    segments.

    Call order: 1. `publish`. 2. `manifest`, `tensors`. 3. `release` or the next `publish`. 4. `close`. One
    thread publishes; the others may be called from any.

    Args:
        source: Read by `publish`; the caller's to close.
        holder_name: Unique name of this holder, for messages and manifests.
        lender: Lends the segments to peers of the same host, if given.
        segment_bytes: Most bytes per segment; a larger region gets a segment of its own.
        num_threads: Readers; by default two per CPU, at most eight.
    """

    def __init__(
        self,
        source: WeightSource,
        holder_name: str,
        *,
        lender: Lender | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        num_threads: int | None = None,
    ) -> None:
        self._source = source
        self._name = holder_name
        self._lender = lender
        self._segment_bytes = segment_bytes
        self._num_threads = num_threads or min(_MAX_THREADS, 2 * (os.cpu_count() or 1))
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._free: list[_SegmentSet] = []
        self._held: dict[int, tuple[_SegmentSet, PublishedVersion]] = {}
        self._pinned: set[int] = set()
        self._layout: Layout | None = None
        self._closed = False

    @property
    def versions(self) -> tuple[int, ...]:
        """Complete versions that are held, oldest first."""
        with self._lock:
            return tuple(self._held)

    def publish(
        self, version: int, progress: Progress | None = None, deadline_s: float = Deadlines().read_s
    ) -> PublishedVersion:
        """Read all regions of the source into segments; afterwards the version is complete and stays so.

        Blocking, in several threads. Where two versions are held, the older is dropped first and its segments
        are taken over; the newest stays as it is, also when this fails.

        Args:
            version: Must be greater than any that is held; one that failed and was released may come again.
            progress: Called from this thread with bytes read and bytes in all.
            deadline_s: Limit for the whole call.

        Raises:
            LocalProtocolError: The version does not grow, or the store is closed or publishing.
            CapacityError: Not enough host memory.
            CheckpointError: The source cannot be read.
            TransferTimeoutError: Reading took too long.
        """
        if not self._publishing.acquire(blocking=False):
            raise LocalProtocolError(
                f"holder {self._name} is publishing already; wait for it", name=self._name
            )
        try:
            self._check_version(version)
            begin = time.monotonic()
            chosen = self._take_set(self._current_layout())
            self._fill(chosen, progress, begin + deadline_s)
            return self._keep(version, chosen, time.monotonic() - begin)
        finally:
            self._publishing.release()

    def _check_version(self, version: int) -> None:
        if self._closed:
            raise LocalProtocolError(f"holder {self._name} is closed; make a new store", name=self._name)
        newest = max(self._held, default=-1)
        if version <= newest:
            message = f"version {version} does not grow; holder {self._name} holds {newest}"
            raise LocalProtocolError(message, name=self._name, weight_version=version)

    def _current_layout(self) -> Layout:
        """Return the layout of what the source has now; the same object while that stays the same."""
        params, regions = self._source.metadata(), tuple(self._source.regions())
        known = self._layout
        if known is None or known.regions != regions or known.params != params:
            known = self._layout = Layout.of(params, regions, self._segment_bytes)
        return known

    def _take_set(self, layout: Layout) -> _SegmentSet:
        """Return segments of `layout` that hold no version any more, making them where there are none."""
        with self._lock:
            for version in list(self._held)[:-1]:
                if version not in self._pinned:
                    self._free.append(self._held.pop(version)[0])
            fitting = [one for one in self._free if one.layout is layout]
            # Two sets take turns; a third is needed only while a version is pinned.
            kept = fitting[: 1 if self._held else 2]
            needless = [one for one in self._free if one not in kept]
            self._free = kept[1:]
        for old in needless:
            old.close()
        return kept[0] if kept else _SegmentSet(layout, self._name, self._lender)

    def _fill(self, chosen: _SegmentSet, progress: Progress | None, end: float) -> None:
        if isinstance(self._source, BulkSource):
            self._fill_at_once(self._source, chosen, progress, end)
            return
        reading = Reading(self._source, chosen.layout, chosen.blocks)
        try:
            reading.run(self._num_threads, progress, end)
        except BaseException as error:
            # The failed reader's frames view the segments, and futures and errors keep each other: a cycle.
            traceback.clear_frames(error.__traceback__)
            is_idle = reading.forget()
            with self._lock:
                # A reader that hangs could still write: segments it may touch are never used again.
                if is_idle and not self._closed:
                    self._free.append(chosen)
                else:
                    chosen.close()
            raise
        # Readers run on idle cores only: on a busy host they end late, and what they refer to as well.
        reading.forget()

    def _fill_at_once(
        self, source: BulkSource, chosen: _SegmentSet, progress: Progress | None, end: float
    ) -> None:
        blocks = chosen.blocks
        try:
            source.fill(chosen.regions, blocks, progress or _silent, max(0.0, end - time.monotonic()))
        except BaseException as error:
            # What was asked for may still land: these segments are never used again.
            traceback.clear_frames(error.__traceback__)
            del blocks
            chosen.close()
            raise

    def _keep(self, version: int, chosen: _SegmentSet, seconds: float) -> PublishedVersion:
        layout = chosen.layout
        holder = HolderAddress(self._name)
        manifest = Manifest(holder, version, layout.params, chosen.descriptors, chosen.regions)
        published = PublishedVersion(version, manifest, layout.num_bytes, seconds)
        try:
            chosen.lend()
        except BaseException:
            chosen.close()
            raise
        with self._lock:
            if not self._closed:
                self._held[version] = (chosen, published)
        if self._closed:
            chosen.close()
            raise LocalProtocolError(f"holder {self._name} was closed while it published", name=self._name)
        _log.info("holder %s: version %d, %d bytes in %.2f s", self._name, version, layout.num_bytes, seconds)
        return published

    def manifest(self, version: int, holder: HolderAddress) -> Manifest:
        """Return the manifest of a held version under the holder's address.

        Raises:
            LocalProtocolError: The version is not held.
        """
        found = self._find(version)[1].manifest
        return Manifest(holder, version, found.params, found.segments, found.regions)

    def segments(self, version: int) -> tuple[HostSegment, ...]:
        """Return the segments of a held version, in the manifest's order; the store's to close."""
        return tuple(self._find(version)[0].segments)

    def segment(self, segment_id: str) -> HostSegment | None:
        """Return the segment of this id, or None where no version that is held lies in it."""
        with self._lock:
            held = [segment for one, _ in self._held.values() for segment in one.segments]
        return next((one for one in held if one.descriptor.segment_id == segment_id), None)

    def tensors(self, version: int) -> list[torch.Tensor]:
        """Return the bytes of each segment of a held version: blocks for digests and transports."""
        return self._find(version)[0].blocks

    def _find(self, version: int) -> tuple[_SegmentSet, PublishedVersion]:
        with self._lock:
            if version not in self._held:
                held = ", ".join(map(str, self._held)) or "none"
                message = f"holder {self._name} does not hold version {version}; held: {held}"
                raise LocalProtocolError(message, name=self._name, weight_version=version)
            return self._held[version]

    def pin(self, version: int, pinned: bool) -> None:
        """Keep a version beyond the two newest, in memory of its own, or no longer; nothing where it is not held."""
        with self._lock:
            if pinned and version in self._held:
                self._pinned.add(version)
            else:
                self._pinned.discard(version)

    def release(self, version: int) -> None:
        """Drop a version; its segments wait for the next `publish`. Idempotent."""
        with self._lock:
            found = self._held.pop(version, None)
            if found is not None:
                self._free.append(found[0])

    def close(self) -> None:
        """Drop all versions and give their memory back once no peer maps it; idempotent."""
        with self._lock:
            self._closed = True
            sets = self._free + [held for held, _ in self._held.values()]
            self._free, self._held = [], {}
        for one in sets:
            one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
