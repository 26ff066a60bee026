"""What holders are at is broken off when nobody wants it any more, and they take the next version then."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from headrace import wire
from headrace.config import Deadlines, host_settings
from headrace.control.hub import Hub
from headrace.errors import ConnectError, UpdateFailedError
from headrace.protocols import SourceRegion
from headrace.server.holders import HolderPool, SourceSpec
from headrace.server.switchboard import Switchboard, gather
from headrace.store.tensors import TensorSource
from headrace.transports.tcp import TcpTransport

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("socket_dir")]


class SlowSource(TensorSource):
    """Takes 40 s, in short reads; `hurry` makes them instant."""

    def __init__(self) -> None:
        super().__init__({f"w{i}": torch.full((64,), i, dtype=torch.uint8) for i in range(200)})
        self.began, self.hurry = threading.Event(), threading.Event()

    def read(self, region: SourceRegion, out: memoryview) -> None:
        self.began.set()
        self.hurry.wait(0.2)
        super().read(region, out)


@pytest.fixture
def source() -> SlowSource:
    return SlowSource()


@pytest.fixture
def pool(source: SlowSource) -> Iterator[HolderPool]:
    """A pool whose holder has begun to read a version."""
    host = host_settings()
    board = Switchboard(Hub(host))
    made = HolderPool(SourceSpec(source=source), board, host)
    try:
        made.ensure(1)
        made.peers[0].send(wire.Publish(version=1, deadline_s=60.0))
        assert source.began.wait(10)
        yield made
    finally:
        made.stop()
        board.close()


def test_a_reading_ends_soon_after_nobody_wants_it(
    pool: HolderPool, source: SlowSource, caplog: pytest.LogCaptureFixture
) -> None:
    """And the same holder reads the next version: what broke the one off does not reach the other."""
    (holder,) = pool.peers
    pool.release(1)
    pool.settle(10.0)
    assert pool.peers == [holder]
    assert "broke the reading off" in caplog.text
    source.hurry.set()
    (manifest,) = pool.publish(1, Deadlines())
    assert manifest.version == 1


def test_a_holder_that_reads_ends_soon(pool: HolderPool, caplog: pytest.LogCaptureFixture) -> None:
    begin = time.monotonic()
    pool.stop()
    assert time.monotonic() - begin < 15.0
    assert "broke the reading off" in caplog.text
    assert "did not end" not in caplog.text


def test_a_version_that_is_dropped_is_not_served_any_more(source: SlowSource, pool: HolderPool) -> None:
    """Its memory is taken over by the next one, whose reading may fail."""
    pool.settle(10.0)
    source.hurry.set()
    old = pool.publish(2, Deadlines())[0]
    pool.publish(3, Deadlines())
    with closing(TcpTransport()) as transport:
        transport.open(old.holder, old.segments[0], 5.0)
        source.close()
        with pytest.raises(UpdateFailedError, match="closed"):
            pool.publish(4, Deadlines())
        transport.retain(())
        with pytest.raises(ConnectError, match="not held"):
            transport.open(old.holder, old.segments[0], 5.0)


def test_a_holder_reads_as_long_as_the_update_gives_it(pool: HolderPool) -> None:
    """Its own limit would end what may take longer, and go on with what nobody waits for any more."""
    (holder,) = pool.peers
    pool.settle(10.0)
    holder.on_progress = lambda _message: None
    holder.send(wire.Publish(version=2, deadline_s=0.5))
    with pytest.raises(UpdateFailedError, match="deadline has passed"):
        gather([holder], wire.Published, 20.0, "read")
