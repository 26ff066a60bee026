"""Reads through mapped memory."""

from __future__ import annotations

import pytest
import torch

from headrace.errors import ConnectError, LocalProtocolError
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.testing.copies import content
from headrace.testing.transport_holder import SEGMENT_BYTES, HolderProcess
from headrace.testing.transport_suite import TransportTests
from headrace.transports import MemoryTransport


class TestMemoryTransport(TransportTests):
    survives_holder = True

    def make_transport(self) -> MemoryTransport:
        return MemoryTransport()

    def test_segments_are_mapped_in_place(self, holder: HolderProcess) -> None:
        transport = MemoryTransport()
        for index, segment in enumerate(holder.segments):
            transport.open(holder.address, segment, 5)
            assert torch.equal(transport.mapped(segment.segment_id), content(index, SEGMENT_BYTES[index]))
        transport.close()

    def test_a_mapping_is_kept_until_it_is_not_retained(self, holder: HolderProcess) -> None:
        transport = MemoryTransport()
        first, second = holder.segments
        for segment in holder.segments:
            transport.open(holder.address, segment, 5)
        before = transport.mapped(first.segment_id)
        transport.open(holder.address, first, 5)
        assert transport.mapped(first.segment_id) is before
        transport.retain([first.segment_id])
        assert transport.mapped(first.segment_id) is before
        with pytest.raises(LocalProtocolError, match="not mapped"):
            transport.mapped(second.segment_id)
        transport.close()
        assert torch.equal(before, content(0, SEGMENT_BYTES[0]))

    @pytest.mark.parametrize(
        ("holder_address", "segment"),
        [
            (HolderAddress("h", unix_socket="/nonexistent/socket"), SegmentDescriptor("a", 5)),
            (HolderAddress("h"), SegmentDescriptor("a", 5)),
            (HolderAddress("h", unix_socket="/nonexistent/socket"), SegmentDescriptor("a", 5, "cuda", b"x")),
        ],
    )
    def test_what_cannot_be_mapped(self, holder_address: HolderAddress, segment: SegmentDescriptor) -> None:
        transport = MemoryTransport()
        with pytest.raises(ConnectError):
            transport.open(holder_address, segment, 1)
