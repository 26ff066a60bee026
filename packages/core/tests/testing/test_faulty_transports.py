"""Transports that break do so where they are told to, and are good transports elsewhere."""

from __future__ import annotations

import time

import pytest
import torch

from headrace.errors import PeerLostError, TransferTimeoutError, TransportClosedError
from headrace.testing.faults import Fault, FaultyTransport, LatencyTransport
from headrace.testing.transport_suite import (
    SEGMENT_BYTES,
    CopyRow,
    HolderProcess,
    TransportTests,
    content,
    table_of,
)
from headrace.transports import MemoryTransport

COPIES = table_of([CopyRow(shape=(500,), src_strides=(2,), dst_strides=(2,), dst_base=10)])


class TestLatencyTransport(TransportTests):
    survives_holder = True

    def make_transport(self) -> LatencyTransport:
        return LatencyTransport(MemoryTransport(), 0.002)

    def make_faulty(self, holder: HolderProcess, *faults: Fault) -> FaultyTransport:
        transport = FaultyTransport(MemoryTransport(), *faults)
        transport.open(holder.address, holder.segments[0], 10)
        return transport

    @pytest.fixture
    def block(self) -> torch.Tensor:
        return torch.zeros(1010, dtype=torch.uint8)

    def test_a_wait_takes_its_time(self, holder: HolderProcess, block: torch.Tensor) -> None:
        transport = LatencyTransport(MemoryTransport(), 0.2)
        transport.open(holder.address, holder.segments[0], 10)
        begin = time.monotonic()
        transport.wait(transport.submit(COPIES, holder.segments[:1], [block]), 10)
        assert time.monotonic() - begin >= 0.2
        transport.close()

    def test_the_chosen_call_fails(self, holder: HolderProcess, block: torch.Tensor) -> None:
        transport = self.make_faulty(holder, Fault(point="wait", action="fail", call=2))
        for fails in (False, True, False):
            job = transport.submit(COPIES, holder.segments[:1], [block])
            if fails:
                with pytest.raises(PeerLostError, match="injected"):
                    transport.wait(job, 10)
            else:
                transport.wait(job, 10)
        transport.close()

    def test_one_bit_is_spoiled(self, holder: HolderProcess, block: torch.Tensor) -> None:
        transport = self.make_faulty(holder, Fault(point="wait", action="corrupt"))
        transport.wait(transport.submit(COPIES, holder.segments[:1], [block]), 10)
        wanted = content(0, SEGMENT_BYTES[0])[:1000]
        assert (block[10:] != wanted).nonzero().flatten().tolist() == [0]
        transport.close()

    def test_a_hang_ends_with_the_deadline_or_with_close(self, holder: HolderProcess, block: torch.Tensor) -> None:
        transport = self.make_faulty(holder, Fault(point="wait", action="hang", times=0))
        job = transport.submit(COPIES, holder.segments[:1], [block])
        with pytest.raises(TransferTimeoutError, match="hung"):
            transport.wait(job, 0.1)
        transport.close()
        with pytest.raises(TransportClosedError):
            transport.wait(job, 60)
