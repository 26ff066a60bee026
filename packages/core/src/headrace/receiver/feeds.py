"""Feeds: where a ring's buckets come from, over a transport or out of a broadcasting holder's ring."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headrace.errors import CapacityError, TransportClosedError
from headrace.manifest import HolderAddress
from headrace.pipeline import RingSignals
from headrace.plan import TransferPlan
from headrace.protocols import Transport
from headrace.receiver.blocks import allocate_bytes
from headrace.receiver.mapped import POPULATE_CHUNK_BYTES
from headrace.segments.cuda import MappedCudaSegment
from headrace.segments.host import MappedSegment
from headrace.segments.lending import borrow
from headrace.wire import RingAddress


@dataclass(frozen=True)
class Feed:
    """Where a ring's buckets come from: `fetch` blocks until a bucket is in its slot, `release` gives the slot back.

    `stop` ends a `fetch` that waits; `close` gives the slots' memory back, when nothing reads them any more.
    """

    name: str
    slots: Sequence[torch.Tensor]
    fetch: Callable[[int, int], None]
    release: Callable[[int], None]
    stop: Callable[[], None]
    close: Callable[[], None]


def tcp_feed(
    plan: TransferPlan,
    holders: Sequence[HolderAddress],
    transport: Transport,
    deadline_s: float,
    *,
    pinned: bool,
) -> Feed:
    """Return a feed that reads each bucket's bytes over `transport` into memory of this worker.

    What earlier plans had opened is forgotten: every run of an updater has holders of its own. `pinned` slots are
    page-locked: a GPU copies out of them.
    """
    for number, segment in enumerate(plan.segments):
        transport.open(holders[int(plan.segment_holder[number])], segment, deadline_s)
    transport.retain({segment.segment_id for segment in plan.segments})
    size, depth = plan.ring.slot_bytes, plan.ring.depth
    slots = [_slot(size, pinned=pinned) for _ in range(depth)]

    def fetch(bucket: int, slot: int) -> None:
        rows = plan.fill.take(slice(int(plan.fill_starts[bucket]), int(plan.fill_starts[bucket + 1])))
        transport.wait(transport.submit(rows, plan.segments, [slots[slot]]), deadline_s)

    return Feed("read", slots, fetch, lambda _count: None, lambda: None, lambda: None)


def _slot(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    if not pinned:
        return allocate_bytes(num_bytes, torch.device("cpu"))
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        message = f"no page-locked memory to stage {num_bytes / 1e6:.1f} MB: {error}; lower budget_bytes"
        raise CapacityError(message, name="budget_bytes", phase="stage") from error


def broadcast_feed(
    plan: TransferPlan, address: RingAddress, deadline_s: float, open_s: float, *, pinned: bool
) -> Feed:
    """Return a feed out of the slots of a broadcasting holder of this host, which stay mapped until it is closed.

    Args:
        plan: What lies in which slot.
        address: The ring of that holder.
        deadline_s: Limit for each wait for a bucket.
        open_s: Limit for mapping slots and signals.
        pinned: Whether a GPU copies out of the slots: in host memory they are page-locked.

    Raises:
        ConnectError: They cannot be mapped here.
        CapacityError: A limit on locked memory.
    """
    ring = _open_ring(address, open_s)
    try:
        signals = RingSignals(borrow(address.holder.unix_socket, address.signals, open_s, writable=True).tensor)
        if pinned:
            ring.prepare(POPULATE_CHUNK_BYTES, pin=True)
    except BaseException:
        ring.close()
        raise
    size = plan.ring.slot_bytes
    slots = [ring.tensor[slot * size : (slot + 1) * size] for slot in range(plan.ring.depth)]
    closed = threading.Event()

    def check_open() -> None:
        if closed.is_set():
            raise TransportClosedError("the ring was closed")

    return Feed(
        "arrive",
        slots,
        lambda bucket, _slot: signals.wait_filled(bucket + 1, deadline_s, check_open),
        lambda count: signals.applied(address.slot_index, count),
        closed.set,
        ring.close,
    )


def _open_ring(address: RingAddress, deadline_s: float) -> MappedSegment | MappedCudaSegment:
    """Map the slots of a broadcasting holder: memory of this worker's GPU, or of its host."""
    if address.ring.kind == "cuda":
        return MappedCudaSegment(address.ring)
    return borrow(address.holder.unix_socket, address.ring, deadline_s)
