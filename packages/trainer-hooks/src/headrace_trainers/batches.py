"""Batches: many tensors, cast and gathered in a small scratch on their device, and copied out of it in long runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from headrace.geometry import Box, boxes_of_flat_range

ALIGN = 64
STRAIGHT_BYTES = 1 << 20
"""From here on a dense tensor that needs no cast goes out without the scratch, in one copy."""
_TOGETHER = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
"""Between these, torch copies and casts a whole list in one kernel."""

_Cast = tuple[torch.dtype, torch.dtype]
Form = tuple[torch.dtype, tuple[int, ...], bool]
"""Dtype, shape, and whether it is dense in row-major order: what batches depend on."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a tensor goes, row-major, cast to `dtype`: segment, and first byte, which is a multiple of `ALIGN`."""

    dtype: torch.dtype
    segment: int
    begin: int


def form_of(tensor: torch.Tensor) -> Form:
    """Return what batches depend on; tensors may be exchanged for others of their form."""
    return tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()


@dataclass(frozen=True, slots=True)
class _Cut:
    """A part of a tensor that goes at once: elements `[first, last)`, row-major; its box where it is strided."""

    number: int
    first: int
    last: int
    box: Box | None = None

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        part = tensors[self.number]
        if self.box is None:
            return part.view(-1)[self.first : self.last]
        for dim, (begin, extent) in enumerate(zip(self.box.offsets, self.box.shape, strict=True)):
            part = part.narrow(dim, begin, extent)
        return part


@dataclass(slots=True)
class _Run:
    """Bytes `[begin, end)` of a segment, which lie from `at` on in the scratch."""

    segment: int
    begin: int
    end: int
    at: int


@dataclass
class Batch:
    """What goes through one scratch at a time. Holds views of the scratch, but none of tensors or segments.

    Attributes:
        scratch: Flat uint8, on the tensors' device.
    """

    scratch: torch.Tensor
    _together: dict[_Cast, tuple[list[_Cut], list[torch.Tensor]]] = field(default_factory=dict)
    _alone: list[tuple[_Cut, torch.Tensor]] = field(default_factory=list)
    _straight: list[tuple[_Cut, Target]] = field(default_factory=list)
    _runs: list[_Run] = field(default_factory=list)
    _used: int = 0

    def run(self, tensors: Sequence[torch.Tensor], segments: Sequence[torch.Tensor]) -> None:
        """Enqueue everything on the current stream: into the scratch, then out of it; returns before it is done.

        Args:
            tensors: Of the forms that the batch was made for.
            segments: Flat uint8; page-locked ones are written to by the device while this thread goes on.
        """
        for cuts, places in self._together.values():
            torch._foreach_copy_(places, [cut.of(tensors) for cut in cuts])
        for cut, place in self._alone:
            place.copy_(cut.of(tensors))
        for run in self._runs:
            part = self.scratch[run.at : run.at + run.end - run.begin]
            segments[run.segment][run.begin : run.end].copy_(part, non_blocking=True)
        for cut, target in self._straight:
            part = cut.of(tensors)
            place = segments[target.segment][target.begin : target.begin + part.nbytes]
            place.view(target.dtype).copy_(part, non_blocking=True)

    def add_straight(self, cut: _Cut, target: Target) -> None:
        """Copy a dense tensor of the target's dtype without the scratch."""
        self._straight.append((cut, target))

    def add(self, cut: _Cut, kind: torch.dtype, target: Target) -> bool:
        """Take a part, which goes to `target`; False, and nothing is done, where the scratch has no room for it."""
        begin = target.begin + cut.first * target.dtype.itemsize
        end = target.begin + cut.last * target.dtype.itemsize
        run = self._runs[-1] if self._runs else None
        follows = run is not None and run.segment == target.segment and 0 <= begin - run.end < ALIGN
        at = self._used + begin - run.end if run is not None and follows else -(-self._used // ALIGN) * ALIGN
        if at + end - begin > self.scratch.numel():
            return False
        if run is not None and follows:
            run.end = end
        else:
            self._runs.append(_Run(target.segment, begin, end, at))
        self._used = at + end - begin
        place = self.scratch[at : self._used].view(target.dtype)
        if cut.box is None and {kind, target.dtype} <= _TOGETHER:
            cuts, places = self._together.setdefault((kind, target.dtype), ([], []))
            cuts.append(cut)
            places.append(place)
        else:
            self._alone.append((cut, place if cut.box is None else place.view(cut.box.shape)))
        return True


def batches_of(forms: Sequence[Form], targets: Sequence[Target], scratches: Sequence[torch.Tensor]) -> list[Batch]:
    """Return batches for tensors of these forms; the n-th goes through the n-th scratch, all of them in turns.

    Args:
        forms: Of the tensors; none is empty.
        targets: Where each goes; disjoint, unless equal.
        scratches: Flat uint8 tensors of equal size, a multiple of `ALIGN`.
    """
    found = [Batch(scratches[0])]
    for number in sorted(range(len(forms)), key=lambda i: (targets[i].segment, targets[i].begin)):
        (kind, shape, is_dense), target = forms[number], targets[number]
        count = prod(shape)
        if is_dense and kind == target.dtype and count * kind.itemsize >= STRAIGHT_BYTES:
            found[-1].add_straight(_Cut(number, 0, count), target)
            continue
        for cut in _cuts(number, forms[number], scratches[0].numel() // target.dtype.itemsize):
            if not found[-1].add(cut, kind, target):
                found.append(Batch(scratches[len(found) % len(scratches)]))
                found[-1].add(cut, kind, target)
    return found


def _cuts(number: int, form: Form, limit: int) -> Iterator[_Cut]:
    """Cut a tensor into parts of at most `limit` elements, in row-major order."""
    _, shape, is_dense = form
    count = prod(shape)
    for begin in range(0, count, limit):
        end = min(begin + limit, count)
        if is_dense:
            yield _Cut(number, begin, end)
            continue
        for box in boxes_of_flat_range(shape, begin, end):
            yield _Cut(number, begin, begin + box.num_elements, box)
            begin += box.num_elements  # noqa: PLW2901 - where the next box begins
