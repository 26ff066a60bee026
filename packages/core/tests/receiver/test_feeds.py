"""Feeds over a transport keep nothing of holders that are gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.config import HostSettings
from headrace.errors import CapacityError, ConnectError, PlanError
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.pipeline import signal_bytes
from headrace.plan import CopyTable, Ring, TransferPlan
from headrace.receiver.buckets import Differences
from headrace.receiver.delivery import RingDelivery
from headrace.receiver.feeds import broadcast_feed, tcp_feed
from headrace.segments import HostSegment, Lender
from headrace.telemetry import Recorder
from headrace.testing.copies import CopyRow, table_of
from headrace.testing.leaks import left_over, snapshot
from headrace.transports import TcpServer, TcpTransport
from headrace.wire import RingAddress

SIZE, SECRET, DEADLINE_S = 64, bytes(32), 5.0
HOST = HostSettings(socket_dir=Path("/nonexistent"), permitted_uids=frozenset())


def plan_of(segment: SegmentDescriptor) -> TransferPlan:
    row = CopyRow(shape=(SIZE,), src_strides=(1,), dst_strides=(1,), src_dtype="uint8", dst_dtype="uint8")
    first, none = np.zeros(1, np.int32), np.zeros(0, np.int64)
    return TransferPlan(
        "direct", "tcp", "why", (segment,), first, table_of([row]), np.array([0, 1]),
        CopyTable.empty(), np.array([0, 0]), first, none, none.astype(np.int32), 1, SIZE, Ring("staged", SIZE, 1, ""),
        np.zeros((0, 4), np.int64), "plan",
    )  # fmt: skip


@pytest.mark.timeout(60)
def test_holders_that_come_one_after_another_leave_nothing_in_the_worker() -> None:
    """As every run of `headrace update` has: a connection to each dead one would stay open for the engine's life."""
    transport, before = TcpTransport(), snapshot()
    for update in range(3):
        data, segment = torch.full((SIZE,), update, dtype=torch.uint8), SegmentDescriptor(f"s{update}", SIZE)
        with TcpServer({segment.segment_id: data}.get, SECRET, HOST) as server:
            holder = HolderAddress(f"h{update}", tcp_endpoint=server.endpoint, tcp_secret=SECRET)
            feed = tcp_feed(plan_of(segment), [holder], transport, DEADLINE_S, pinned=False)
            feed.fetch(0, 0)
            assert torch.equal(feed.slots[0], data)
        if update == 0:
            before = snapshot()
    assert left_over(before) == []
    assert list(transport._idle) == [holder]
    assert list(transport._holder_of) == [segment.segment_id]
    transport.close()


def test_memory_that_cannot_be_page_locked_is_told_with_the_way_out() -> None:
    """As here, where there is no GPU to lock it for."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    segment = SegmentDescriptor("s", SIZE)
    data = {"s": torch.zeros(SIZE, dtype=torch.uint8)}
    with TcpServer(data.get, SECRET, HOST) as server, closing(TcpTransport()) as way:
        holder = HolderAddress("h", tcp_endpoint=server.endpoint, tcp_secret=SECRET)
        with pytest.raises(CapacityError, match="lower budget_bytes"):
            tcp_feed(plan_of(segment), [holder], way, DEADLINE_S, pinned=True)


@pytest.fixture
def lender(tmp_path: Path) -> Iterator[Lender]:
    with Lender(HostSettings(socket_dir=tmp_path / "s", permitted_uids=frozenset({os.getuid()}))) as lender:
        yield lender


def is_mapped(name: str) -> bool:
    return f"memfd:{name}" in Path("/proc/self/maps").read_text()


def ring_of(lender: Lender, *, whole: bool) -> RingAddress:
    """Lend a ring whose own mapping is gone; where it is not whole, without its signals."""
    made = [HostSegment(SIZE, "feed-ring"), HostSegment(signal_bytes(1), "feed-words", peers_write=True)]
    for segment in made if whole else made[:1]:
        lender.lend(segment)
    for segment in made:
        segment.close()
    ring, words = (segment.descriptor for segment in made)
    return RingAddress(HolderAddress("h", lender.unix_socket), ring, words, 0)


def test_a_ring_without_its_signals_is_unmapped_at_once(lender: Lender) -> None:
    """The error is kept here, and with it whatever its frames refer to."""
    plan = plan_of(SegmentDescriptor("s", SIZE))
    with pytest.raises(ConnectError) as error:
        broadcast_feed(plan, ring_of(lender, whole=False), DEADLINE_S, DEADLINE_S, pinned=False)
    assert not is_mapped("feed-ring"), error


def test_a_delivery_that_cannot_be_made_closes_its_feed(lender: Lender) -> None:
    outside = table_of([CopyRow(shape=(SIZE + 1,), src_strides=(1,), dst_strides=(1,))])
    plan = replace(plan_of(SegmentDescriptor("s", SIZE)), apply=outside, apply_starts=np.array([0, 1]))
    feed, closed = broadcast_feed(plan, ring_of(lender, whole=True), DEADLINE_S, DEADLINE_S, pinned=False), []
    assert is_mapped("feed-ring")
    watched = replace(feed, close=lambda: closed.append(feed.close()))
    with pytest.raises(PlanError):
        RingDelivery(plan, watched, [torch.zeros(9, dtype=torch.uint8)], Differences(plan, []), Recorder("r"), bool)
    assert closed == [None]
