"""How bytes come to this worker, by route: what is done while the engine serves, and what is left for the pause."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from headrace.errors import ApplyError, IntegrityError, TransferTimeoutError, TransportClosedError
from headrace.geometry import dense_strides
from headrace.manifest import HolderAddress
from headrace.pipeline import PipelineStage, RingPipeline, RingSignals
from headrace.plan import CopyTable, TransferPlan, buffered, staged_bytes
from headrace.protocols import Transport
from headrace.receiver.blocks import allocate_bytes
from headrace.segments.host import MappedSegment
from headrace.telemetry import Recorder
from headrace.transports.binding import Program, bind_copies
from headrace.transports.memory import MemoryTransport
from headrace.types import I64, ITEMSIZES

POPULATE_CHUNK_BYTES = 16 << 20
STAGE_COPY_S = 60.0


class Delivery(Protocol):
    """One plan's way into live tensors. Call order: 1. `stage`. 2. `commit`, again after a failure. 3. `close`."""

    def stage(self, deadline_s: float) -> None:
        """Fetch what can be fetched before the pause; live tensors are not touched."""
        ...

    def commit(self, deadline_s: float, writing: Callable[[], None], *, compare: bool) -> None:
        """Write every live byte; with `compare`, also check each against its source.

        `writing` is called right before the first live byte changes.

        Raises:
            IntegrityError: `compare` found different bytes.
        """
        ...

    def close(self) -> None:
        """Release what staging took; idempotent."""
        ...


@dataclass(frozen=True)
class _Bucket:
    """One bucket's copies: those into opaque buffers, which may run early, and those into live tensors."""

    opaque: Program
    live: Program
    live_rows: np.ndarray
    num_bytes: int
    staged: Program | None = None

    def differences(self) -> np.ndarray:
        """Return the rows of the plan whose live bytes, or what was staged for them, differ from the source."""
        found = self.live.differences()
        if self.staged is not None:
            found = sorted({*found, *self.staged.differences()})
        return np.asarray(self.live_rows[found])


def _bucket(
    plan: TransferPlan,
    apply: CopyTable,
    bounds: tuple[int, int],
    sources: Sequence[torch.Tensor],
    blocks: list[torch.Tensor],
    *,
    undisturbed: bool,
) -> _Bucket:
    """Bind rows `[begin, end)` of `apply`; `undisturbed` if nothing is fetched while they run."""
    begin, end = bounds
    is_opaque = apply.dst_block[begin:end] >= plan.num_targets
    rows = np.arange(begin, end)
    live = rows[~is_opaque]
    table = apply.take(live)
    return _Bucket(
        opaque=bind_copies(apply.take(rows[is_opaque]), sources, blocks),
        live=bind_copies(table, sources, blocks, undisturbed=undisturbed),
        live_rows=live,
        num_bytes=_live_bytes(table),
    )


def _mapped_bucket(
    plan: TransferPlan, bounds: tuple[int, int], sources: Sequence[torch.Tensor], blocks: list[torch.Tensor]
) -> _Bucket:
    """Bind copies out of mapped memory; where the plan buffers some, `staged` fills the buffer that `live` reads.

    Raises:
        CapacityError: There is no room for the buffer.
    """
    table = plan.apply.take(slice(*bounds))
    rows = np.flatnonzero(buffered(table, plan.ring.mode) & (table.dst_block < plan.num_targets))
    if not len(rows):
        return _bucket(plan, plan.apply, bounds, sources, blocks, undisturbed=True)
    chosen = table.take(rows)
    sizes, itemsize = staged_bytes(chosen), ITEMSIZES[chosen.src_dtype]
    device = next((block.device for block in blocks if block.is_cuda), torch.device("cpu"))
    buffer = allocate_bytes(int(sizes.sum()), device)
    base, strides = np.cumsum(sizes) - sizes, dense_strides(chosen.shape, itemsize)
    first = np.zeros(len(rows), np.int32)
    fill = replace(
        chosen, dst_block=first, dst_base=base, dst_strides=strides, dst_dtype=chosen.src_dtype
    )
    rows += bounds[0]
    apply = replace(
        plan.apply,
        src_block=_with(plan.apply.src_block, rows, len(sources)),
        src_base=_with(plan.apply.src_base, rows, base),
        src_strides=_with(plan.apply.src_strides, rows, strides),
    )
    bucket = _bucket(plan, apply, bounds, [*sources, buffer], blocks, undisturbed=True)
    return replace(bucket, staged=bind_copies(fill, sources, [buffer], gentle=True))


def _with(column: np.ndarray, rows: I64, values: np.ndarray | int) -> np.ndarray:
    """Return a copy of a table's column with some rows replaced."""
    changed = column.copy()
    changed[rows] = values
    return changed


def _bounds(plan: TransferPlan) -> list[tuple[int, int]]:
    """Return the rows of each bucket of `plan.apply`."""
    return list(pairwise(plan.apply_starts.tolist()))


def _live_bytes(table: CopyTable) -> int:
    return int((table.num_elements * ITEMSIZES[table.dst_dtype]).sum())


class Differences:
    """Turns rows that differ into an IntegrityError that names parameters."""

    def __init__(self, plan: TransferPlan, target_names: Sequence[str]) -> None:
        self._plan = plan
        self._names = target_names

    def check(self, bucket: _Bucket) -> None:
        """Compare a bucket's live tensors with its sources.

        Raises:
            IntegrityError: Names the parameters that differ.
        """
        rows = bucket.differences()
        if len(rows):
            names = sorted({self._names[int(i)] for i in self._plan.apply.dst_block[rows]})
            message = (
                f"{len(names)} parameters differ from their source after the copy: {', '.join(names[:5])}"
            )
            raise IntegrityError(message, name=names[0], phase="verify")


class DirectDelivery:
    """Copies from mapped holder memory into live tensors: straight, or by way of a buffer."""

    def __init__(
        self,
        plan: TransferPlan,
        holders: Sequence[HolderAddress],
        transport: MemoryTransport,
        blocks: list[torch.Tensor],
        differences: Differences,
        recorder: Recorder,
    ) -> None:
        self._plan = plan
        self._holders = holders
        self._transport = transport
        self._blocks = blocks
        self._differences = differences
        self._recorder = recorder
        self._buckets: list[_Bucket] = []

    def stage(self, deadline_s: float) -> None:
        """Map the holders' segments, touch or page-lock them in chunks, and build the copies' views."""
        on_gpu = any(block.is_cuda for block in self._blocks)
        with self._recorder.span("map"):
            for number, segment in enumerate(self._plan.segments):
                holder = self._holders[int(self._plan.segment_holder[number])]
                self._transport.open(holder, segment, deadline_s)
                self._transport.mapping(segment.segment_id).prepare(POPULATE_CHUNK_BYTES, pin=on_gpu)
        sources = [self._transport.mapped(segment.segment_id) for segment in self._plan.segments]
        # A GPU is given everything in one go: its copies run on while the next ones are handed over.
        bounds = [(0, len(self._plan.apply))] if on_gpu else _bounds(self._plan)
        with self._recorder.span("build"):
            self._buckets = [_mapped_bucket(self._plan, b, sources, self._blocks) for b in bounds]
        with self._recorder.span("stage"):
            for bucket in self._buckets:
                if bucket.staged is not None:
                    bucket.staged.run()
                    bucket.staged.finish(deadline_s)
                bucket.opaque.run()
                bucket.opaque.finish(deadline_s)

    def commit(self, deadline_s: float, writing: Callable[[], None], *, compare: bool) -> None:
        """Run the copies; absolute, so it may be repeated."""
        limit = time.monotonic() + deadline_s
        writing()
        for bucket in self._buckets:
            left = check_deadline(limit, deadline_s)
            with self._recorder.span("copy", bucket.num_bytes):
                bucket.live.run()
                bucket.live.finish(left)
        if compare:
            with self._recorder.span("verify"):
                for bucket in self._buckets:
                    self._differences.check(bucket)

    def close(self) -> None:
        """Drop the views; mappings stay with the transport for the next version."""
        self._buckets = []


@dataclass(frozen=True)
class Feed:
    """Where a ring's buckets come from: `fetch` blocks until a bucket is in its slot, `release` gives the slot back."""

    name: str
    slots: Sequence[torch.Tensor]
    fetch: Callable[[int, int], None]
    release: Callable[[int], None]
    close: Callable[[], None]


class RingDelivery:
    """Copies out of a ring of slots that a feed fills: TCP reads, or a broadcast by a holder of this host.

    With a slot per bucket everything is fetched while the engine serves. With fewer, the ring is full when the pause
    begins and goes round inside it.
    """

    def __init__(
        self,
        plan: TransferPlan,
        feed: Feed,
        blocks: list[torch.Tensor],
        differences: Differences,
        recorder: Recorder,
        alive: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._feed = feed
        self._alive = alive
        self._differences = differences
        self._recorder = recorder
        depth = plan.ring.depth
        staged = depth >= plan.num_buckets
        buckets = [
            _bucket(plan, plan.apply, rows, [feed.slots[b % depth]], blocks, undisturbed=staged)
            for b, rows in enumerate(_bounds(plan))
        ]
        self._buckets = buckets
        # No stage refers to this object: engines may never collect cycles, and slots are large.
        self._pipeline = RingPipeline(
            [
                PipelineStage(feed.name, feed.fetch),
                PipelineStage("stage", lambda bucket, _slot: buckets[bucket].opaque.run()),
            ],
            plan.num_buckets,
            depth,
            recorder,
            plan.bucket_bytes.tolist(),
        )
        self._released = 0

    def _stage_opaque(self, number: int) -> None:
        """Copy what the loader will get out of a slot; done when this returns, as the slot may be given back."""
        program = self._buckets[number].opaque
        program.run()
        program.finish(STAGE_COPY_S)

    def stage(self, deadline_s: float) -> None:
        """Fill as many slots as there are."""
        self._pipeline.start()
        ahead = min(self._plan.ring.depth, self._plan.num_buckets)
        if ahead:
            self._pipeline.wait_ready(ahead - 1, deadline_s, self._alive)

    def commit(self, deadline_s: float, writing: Callable[[], None], *, compare: bool) -> None:
        """Take bucket after bucket; may be repeated as long as no slot was given back."""
        limit = time.monotonic() + deadline_s
        staged = self._plan.ring.depth >= self._plan.num_buckets
        for number, bucket in enumerate(self._buckets):
            if self._released > number:
                message = "a commit from a reused ring cannot be repeated"
                raise ApplyError(message, phase="commit", weights_state="mixed")
            self._pipeline.wait_ready(number, check_deadline(limit, deadline_s), self._alive)
            writing()
            with self._recorder.span("copy", bucket.num_bytes):
                bucket.live.run()
                bucket.live.finish(check_deadline(limit, deadline_s))
            if compare:
                with self._recorder.span("verify"):
                    self._differences.check(bucket)
            if not staged:
                self._give_back(number)

    def close(self) -> None:
        """Give all slots back and stop fetching."""
        self._feed.release(self._plan.num_buckets)
        self._feed.close()
        self._pipeline.close()
        self._buckets.clear()

    def _give_back(self, number: int) -> None:
        self._released = number + 1
        self._feed.release(number + 1)
        self._pipeline.release(number)


def check_deadline(limit: float, deadline_s: float) -> float:
    """Return the seconds left until `limit`.

    Raises:
        TransferTimeoutError: None are left.
    """
    left = limit - time.monotonic()
    if left <= 0:
        message = f"the commit did not end within {deadline_s:.1f} s"
        raise TransferTimeoutError(message, phase="commit")
    return left


def tcp_feed(
    plan: TransferPlan,
    holders: Sequence[HolderAddress],
    transport: Transport,
    deadline_s: float,
    *,
    pinned: bool,
) -> Feed:
    """Return a feed that reads each bucket's bytes over `transport` into memory of this worker.

    `pinned` slots are page-locked: a GPU copies out of them.
    """
    for number, segment in enumerate(plan.segments):
        transport.open(holders[int(plan.segment_holder[number])], segment, deadline_s)
    size, depth = plan.ring.slot_bytes, plan.ring.depth
    slots = [_slot(size, pinned=pinned) for _ in range(depth)]

    def fetch(bucket: int, slot: int) -> None:
        rows = plan.fill.take(slice(int(plan.fill_starts[bucket]), int(plan.fill_starts[bucket + 1])))
        transport.wait(transport.submit(rows, plan.segments, [slots[slot]]), deadline_s)

    return Feed("read", slots, fetch, lambda _count: None, lambda: None)


def _slot(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return allocate_bytes(num_bytes, torch.device("cpu"))


def broadcast_feed(
    plan: TransferPlan, ring: MappedSegment, signals: RingSignals, receiver: int, deadline_s: float
) -> Feed:
    """Return a feed that waits for the broadcasting holder of this host to fill its slots; it closes `ring`."""
    size = plan.ring.slot_bytes
    slots = [ring.tensor[slot * size : (slot + 1) * size] for slot in range(plan.ring.depth)]
    closed = threading.Event()

    def check_open() -> None:
        if closed.is_set():
            raise TransportClosedError("the ring was closed")

    def close() -> None:
        closed.set()
        ring.close()

    return Feed(
        "arrive",
        slots,
        lambda bucket, _slot: signals.wait_filled(bucket + 1, deadline_s, check_open),
        lambda count: signals.applied(receiver, count),
        close,
    )
