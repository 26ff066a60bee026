"""How bytes come to this worker, by route: what is done while the engine serves, and what is left for the pause."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from headrace.errors import ApplyError, IntegrityError, TransferTimeoutError, TransportClosedError
from headrace.manifest import HolderAddress
from headrace.pipeline import PipelineStage, RingPipeline, RingSignals
from headrace.plan import CopyTable, TransferPlan
from headrace.protocols import Transport
from headrace.telemetry import Recorder
from headrace.transports.memory import MemoryTransport
from headrace.transports.program import CopyProgram
from headrace.types import ITEMSIZES

POPULATE_CHUNK_BYTES = 16 << 20


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

    opaque: CopyProgram
    live: CopyProgram
    live_rows: np.ndarray
    num_bytes: int


def _bucket(
    plan: TransferPlan,
    number: int,
    sources: Sequence[torch.Tensor],
    blocks: list[torch.Tensor],
    *,
    undisturbed: bool,
) -> _Bucket:
    """Bind one bucket's copies; `undisturbed` if nothing is fetched while they run."""
    begin, end = int(plan.apply_starts[number]), int(plan.apply_starts[number + 1])
    is_opaque = plan.apply.dst_block[begin:end] >= plan.num_targets
    rows = np.arange(begin, end)
    live = rows[~is_opaque]
    table = plan.apply.take(live)
    return _Bucket(
        opaque=CopyProgram(plan.apply.take(rows[is_opaque]), sources, blocks),
        live=CopyProgram(table, sources, blocks, undisturbed=undisturbed),
        live_rows=live,
        num_bytes=_live_bytes(table),
    )


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
        rows = bucket.live_rows[bucket.live.differences()]
        if len(rows):
            names = sorted({self._names[int(i)] for i in self._plan.apply.dst_block[rows]})
            message = (
                f"{len(names)} parameters differ from their source after the copy: {', '.join(names[:5])}"
            )
            raise IntegrityError(message, name=names[0], phase="verify")


class DirectDelivery:
    """Copies straight from mapped holder memory into live tensors; no buffer in between."""

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
        """Map the holders' segments, touch their pages in chunks, and build the copies' views."""
        with self._recorder.span("map"):
            for number, segment in enumerate(self._plan.segments):
                holder = self._holders[int(self._plan.segment_holder[number])]
                self._transport.open(holder, segment, deadline_s)
                self._transport.mapping(segment.segment_id).populate(POPULATE_CHUNK_BYTES)
        sources = [self._transport.mapped(segment.segment_id) for segment in self._plan.segments]
        with self._recorder.span("build"):
            self._buckets = [
                _bucket(self._plan, b, sources, self._blocks, undisturbed=True)
                for b in range(self._plan.num_buckets)
            ]
        with self._recorder.span("stage"):
            for bucket in self._buckets:
                bucket.opaque.run()

    def commit(self, deadline_s: float, writing: Callable[[], None], *, compare: bool) -> None:
        """Run the copies; absolute, so it may be repeated."""
        limit = time.monotonic() + deadline_s
        writing()
        for bucket in self._buckets:
            check_deadline(limit, deadline_s)
            with self._recorder.span("copy", bucket.num_bytes):
                bucket.live.run()
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
            _bucket(plan, b, [feed.slots[b % depth]], blocks, undisturbed=staged)
            for b in range(plan.num_buckets)
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
    plan: TransferPlan, holders: Sequence[HolderAddress], transport: Transport, deadline_s: float
) -> Feed:
    """Return a feed that reads each bucket's bytes over `transport` into memory of this worker."""
    for number, segment in enumerate(plan.segments):
        transport.open(holders[int(plan.segment_holder[number])], segment, deadline_s)
    slots = [torch.empty(plan.ring.slot_bytes, dtype=torch.uint8) for _ in range(plan.ring.depth)]

    def fetch(bucket: int, slot: int) -> None:
        rows = plan.fill.take(slice(int(plan.fill_starts[bucket]), int(plan.fill_starts[bucket + 1])))
        transport.wait(transport.submit(rows, plan.segments, [slots[slot]]), deadline_s)

    return Feed("read", slots, fetch, lambda _count: None, lambda: None)


def broadcast_feed(
    plan: TransferPlan, ring: torch.Tensor, signals: RingSignals, receiver: int, deadline_s: float
) -> Feed:
    """Return a feed that waits for the broadcasting holder of this host to fill its slots."""
    size = plan.ring.slot_bytes
    slots = [ring[slot * size : (slot + 1) * size] for slot in range(plan.ring.depth)]
    closed = threading.Event()

    def check_open() -> None:
        if closed.is_set():
            raise TransportClosedError("the ring was closed")

    return Feed(
        "arrive",
        slots,
        lambda bucket, _slot: signals.wait_filled(bucket + 1, deadline_s, check_open),
        lambda count: signals.applied(receiver, count),
        closed.set,
    )
