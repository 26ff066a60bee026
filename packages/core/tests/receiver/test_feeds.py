"""Feeds over a transport keep nothing of holders that are gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.config import HostSettings
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.plan import CopyTable, Ring, TransferPlan
from headrace.receiver.feeds import tcp_feed
from headrace.testing.copies import CopyRow, table_of
from headrace.testing.leaks import left_over, snapshot
from headrace.transports import TcpServer, TcpTransport

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
