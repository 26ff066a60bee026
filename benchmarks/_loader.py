"""What other systems do in the pause: the engine's own loader, tensor by tensor, over memory of the same host."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import torch

from headrace.config import host_settings
from headrace.manifest import SegmentDescriptor
from headrace.protocols import InferenceBackend
from headrace.segments.host import HostSegment, MappedSegment
from headrace.segments.lending import Lender, borrow
from headrace.testing.bare_engine import BareEngine

_BORROW_S = 10.0
_Place = tuple[str, str, tuple[int, ...], int, int]
_mapped: dict[str, tuple[MappedSegment, list[tuple[str, torch.Tensor]]]] = {}


class SharedTensors:
    """Whole tensors in one segment that all workers of an engine have mapped, pages and views included.

    Use as a context. Lives in the updater.
    """

    def __init__(self, engine: BareEngine, tensors: dict[str, torch.Tensor]) -> None:
        self._engine, self._tensors = engine, tensors
        self._places = _places(tensors)
        self._segment = HostSegment(self._places[-1][-1], "benchmark-loader")
        self._lender = Lender(host_settings())
        self._lender.start()
        self._lender.lend(self._segment)
        self.write()
        engine.call_all(_open, self._lender.unix_socket, self._segment.descriptor, self._places)

    def write(self) -> None:
        """Write what the tensors hold now."""
        for name, _, _, begin, end in self._places:
            self._segment.tensor[begin:end].copy_(self._tensors[name].flatten().view(torch.uint8))

    def load_seconds(self) -> float:
        """Have all workers load everything at once; returns the slowest worker's time."""
        return float(max(self._engine.call_all(_load, self._segment.descriptor.segment_id)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.call_all(_drop, self._segment.descriptor.segment_id)
        self._lender.close()
        self._segment.close()


def _places(tensors: dict[str, torch.Tensor]) -> list[_Place]:
    places, begin = [], 0
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        places.append((name, kind, tuple(tensor.shape), begin, begin + tensor.nbytes))
        begin += tensor.nbytes
    return places


def _open(
    _backend: InferenceBackend,
    _receiver: object,
    socket: str,
    descriptor: SegmentDescriptor,
    places: list[_Place],
) -> None:
    mapped = borrow(socket, descriptor, _BORROW_S)
    mapped.populate()
    pairs = [
        (name, mapped.tensor[begin:end].view(getattr(torch, kind)).view(shape))
        for name, kind, shape, begin, end in places
    ]
    _mapped[descriptor.segment_id] = (mapped, pairs)


def _load(backend: InferenceBackend, _receiver: object, segment_id: str) -> float:
    begin = time.monotonic()
    backend.load(_mapped[segment_id][1])
    seconds: float = time.monotonic() - begin
    return seconds


def _drop(_backend: InferenceBackend, _receiver: object, segment_id: str) -> None:
    _mapped.pop(segment_id)[0].close()
