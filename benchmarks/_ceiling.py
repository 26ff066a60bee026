"""The ceiling of a commit on a CPU: every worker at once copies as many bytes in one piece."""

from __future__ import annotations

import ctypes
import time
from types import TracebackType
from typing import Self

import torch

from headrace.config import host_settings
from headrace.manifest import SegmentDescriptor
from headrace.protocols import InferenceBackend
from headrace.segments.host import HostSegment, MappedSegment
from headrace.segments.lending import Lender, borrow
from headrace.segments.pages import make_pages
from headrace.testing.bare_engine import BareEngine

_BORROW_S = 10.0
_kept: dict[str, tuple[MappedSegment, torch.Tensor]] = {}


class PlainCopy:
    """A shared segment that all workers of an engine copy from at once, each its own part, into touched memory.

    Use as a context. Lives in the updater; the workers keep mapping and buffer until `close`.

    Args:
        engine: Workers that copy.
        num_bytes: Bytes that each copies.
    """

    def __init__(self, engine: BareEngine, num_bytes: int) -> None:
        self._engine = engine
        self._num_bytes = num_bytes
        self._segment = HostSegment(num_bytes * engine.world_size, "benchmark-ceiling")
        make_pages(self._segment.tensor)
        self._lender = Lender(host_settings())
        self._lender.start()
        self._lender.lend(self._segment)
        engine.call_all(_open, self._lender.unix_socket, self._segment.descriptor, num_bytes)

    def seconds(self) -> float:
        """Write fresh bytes, have all workers copy them, and return the slowest worker's time, the best way of two."""
        best = []
        for way in ("copy_", "memmove"):
            self._segment.tensor.view(torch.int64)[: self._num_bytes * self._engine.world_size // 8].add_(1)
            best.append(float(max(self._engine.call_all(_copy, self._segment.descriptor.segment_id, way))))
        return min(best)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.call_all(_drop, self._segment.descriptor.segment_id)
        self._lender.close()
        self._segment.close()


def _open(
    backend: InferenceBackend, _receiver: object, socket: str, descriptor: SegmentDescriptor, num_bytes: int
) -> None:
    mapped = borrow(socket, descriptor, _BORROW_S)
    mapped.populate()
    rank = backend.identity().worker.rank
    _kept[descriptor.segment_id] = (mapped, torch.zeros(num_bytes, dtype=torch.uint8))
    _kept[descriptor.segment_id][1].copy_(_part(mapped, rank, num_bytes))


def _part(mapped: MappedSegment, rank: int, num_bytes: int) -> torch.Tensor:
    return mapped.tensor[rank * num_bytes : (rank + 1) * num_bytes]


def _copy(backend: InferenceBackend, _receiver: object, segment_id: str, way: str) -> float:
    mapped, buffer = _kept[segment_id]
    source = _part(mapped, backend.identity().worker.rank, buffer.numel())
    begin = time.monotonic()
    if way == "copy_":
        buffer.copy_(source)
    else:
        ctypes.memmove(buffer.data_ptr(), source.data_ptr(), buffer.numel())
    seconds: float = time.monotonic() - begin
    return seconds


def _drop(_backend: InferenceBackend, _receiver: object, segment_id: str) -> None:
    _kept.pop(segment_id)[0].close()
