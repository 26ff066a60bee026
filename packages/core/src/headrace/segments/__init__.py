"""Memory that one process owns and others open: host memfds, and the socket that lends them."""

from headrace.segments.capacity import available_memory_bytes, require_memory
from headrace.segments.host import HostSegment, MappedSegment, host_segments
from headrace.segments.lending import Lender, borrow, probe

__all__ = [
    "HostSegment",
    "Lender",
    "MappedSegment",
    "available_memory_bytes",
    "borrow",
    "host_segments",
    "probe",
    "require_memory",
]
