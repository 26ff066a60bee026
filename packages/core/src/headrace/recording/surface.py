"""What a loader wrote where, as integers: grids of memory, boxes of them, how copies compose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch

from headrace.geometry import Box, Loop, PlacedBox, Shape, boxes_of_flat_range, contiguous_strides, place_copy

MAX_BOXES = 4096
"""Most boxes that one copy may fall into; beyond it the destination is opaque."""

FILL = -1
"""Source id of a constant."""

_EXACT = {
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float32),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
}
_FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}


@dataclass(frozen=True, slots=True)
class Grid:
    """A tensor's memory as a dense row-major index space: dims in memory order, gaps as indices nobody uses.

    Attributes:
        shape: Extents, gaps included.
        valid: Box of the indices that are the tensor's elements.
        origin: Storage offset of the tensor's first element.
    """

    shape: Shape
    valid: Box
    origin: int = 0

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Grid | None:
        """Return the grid of a tensor's memory, or None where elements share memory or dims do not nest."""
        if tensor.numel() == 0:
            return cls((0,), Box((0,), (0,)), int(tensor.storage_offset()))
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        dims = sorted(((stride, extent) for stride, extent in pairs if extent > 1), reverse=True)
        extents: list[int] = []
        above: int | None = None
        for stride, extent in dims:
            if stride == 0 or (above is not None and (above % stride or above // stride < extent)):
                return None
            extents.append(extent if above is None else above // stride)
            above = stride
        used = [extent for _, extent in dims]
        if above is not None and above > 1:
            extents, used = [*extents, above], [*used, 1]
        return cls(tuple(extents), Box.whole(tuple(used)), int(tensor.storage_offset()))

    @classmethod
    def flat(cls, num_elements: int) -> Grid:
        """Return the grid of memory of which only the size is known."""
        return cls((num_elements,), Box.whole((num_elements,)))


@dataclass(frozen=True, slots=True)
class Content:
    """What elements hold: a source's values or a constant, and the rounding they have been through.

    Attributes:
        source: Source id, or `FILL`.
        dtype: Dtype in which the values are exact now.
        rounded: Whether `dtype` is narrower than what the source holds.
        value: The constant of a `FILL`.
    """

    source: int
    dtype: torch.dtype
    rounded: bool = False
    value: float = 0.0

    def cast(self, to: torch.dtype) -> Content | None:
        """Return the content after `copy_` into memory of `to`, or None where no direct cast equals it."""
        if self.source == FILL:
            return Content(FILL, to, False, rounded_to(self.value, to))
        if to == self.dtype:
            return self
        if (self.dtype, to) in _EXACT:
            return self
        if self.rounded or self.dtype not in _FLOATS or to not in _FLOATS:
            return None
        return replace(self, dtype=to, rounded=True)

    def lands_in(self, target: torch.dtype) -> bool:
        """Return whether a direct `copy_` from the source into a target of this dtype gives the same bits."""
        return self.source == FILL or not self.rounded or self.dtype == target


@dataclass(frozen=True, slots=True)
class Run:
    """A strided copy, in elements: `loops` step through the source's and the destination's memory."""

    content: Content
    source: int
    target: int
    loops: tuple[Loop, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a grid and its content: source element `base + sum((x - offsets) * strides)`."""

    box: Box
    content: Content
    base: int
    strides: Shape

    def cut(self, box: Box) -> Piece:
        """Return the part of the piece in `box`, which must lie inside it."""
        return Piece(box, self.content, _element(self.base, self.strides, self.box, box), self.strides)


@dataclass(slots=True, eq=False)
class Surface:
    """Memory that a loader writes to: a target or a temporary.

    Attributes:
        dtype: Element type of the memory.
        grid: Its memory, or None where it cannot be followed.
        name: Name of the target; None for a temporary.
        pieces: What was written; later ones win until `settle`.
        feeds: Every source that was ever written here.
        broken: Why the content is not known, if it is not.
    """

    dtype: torch.dtype
    grid: Grid | None
    name: str | None = None
    pieces: list[Piece] = field(default_factory=list)
    feeds: set[int] = field(default_factory=set)
    broken: str | None = None
    settled: bool = True

    @property
    def written(self) -> bool:
        """Whether the loader has put anything here."""
        return bool(self.pieces) or self.broken is not None

    def breaks(self, why: str, feeds: set[int]) -> None:
        """Forget the content: from here on what depends on it is opaque."""
        self.broken = self.broken or why
        self.feeds |= feeds

    def write(self, run: Run) -> None:
        """Note a copy into this memory; breaks the surface where the copy cannot be followed."""
        if run.content.source != FILL:
            self.feeds.add(run.content.source)
        content = run.content.cast(self.dtype)
        if self.grid is None:
            return self.breaks("the tensor's elements share memory", set())
        if content is None:
            return self.breaks(_no_cast(run.content, self.dtype), set())
        swapped = [Loop(loop.extent, loop.target, loop.source) for loop in run.loops]
        placed = place(self.grid.shape, swapped, run.target - self.grid.origin, run.source)
        if placed is None:
            return self.breaks(f"a copy falls into more than {MAX_BOXES} boxes", set())
        self.pieces += [Piece(p.box, content, p.base, p.strides) for p in placed]
        self.settled = len(self.pieces) < 2
        return None

    def settle(self) -> list[Piece]:
        """Return the pieces made disjoint: where several overlap, the last one written wins."""
        if not self.settled:
            self.pieces = disjoint(self.pieces)
            self.settled = True
        return self.pieces

    def read(self, loops: Sequence[Loop], begin: int, target: int) -> list[Run] | None:
        """Return the runs behind a view of this memory, or None where part of it is unknown.

        Args:
            loops: The view; `source` strides step through this memory, `target` strides through the reader's.
            begin: Storage offset of the view's first element here.
            target: The reader's first element.
        """
        if self.broken is not None or self.grid is None:
            return None
        wanted = place(self.grid.shape, loops, begin - self.grid.origin, target)
        if wanted is None:
            return None
        pieces, runs, found = self.settle(), [], 0
        for want in wanted:
            for piece in pieces:
                common = want.box.intersect(piece.box)
                if common is not None:
                    found += common.num_elements
                    runs.append(_join(piece, want, common))
        return runs if found == sum(want.box.num_elements for want in wanted) else None

    def num_missing(self) -> int:
        """Return how many elements nothing was written to."""
        if self.grid is None:
            return 0
        common = (piece.box.intersect(self.grid.valid) for piece in self.settle())
        return self.grid.valid.num_elements - sum(box.num_elements for box in common if box)


def place(shape: Shape, loops: Sequence[Loop], source: int, target: int) -> list[PlacedBox] | None:
    """Do `geometry.place_copy` on merged loops; a flat range that wraps unevenly is cut at its rows."""
    merged = merge(loops)
    placed = place_copy(shape, merged, source, target, MAX_BOXES)
    if placed is not None or len(merged) != 1 or merged[0].source != 1:
        return placed
    step, dense = merged[0].target, contiguous_strides(shape)
    return [
        PlacedBox(box, target + (_dot(box.offsets, dense) - source) * step, tuple(s * step for s in dense))
        for box in boxes_of_flat_range(shape, source, source + merged[0].extent)
    ]


def merge(loops: Sequence[Loop]) -> list[Loop]:
    """Join loops that continue each other on both sides; outermost in the source first."""
    if len(loops) == 1:
        return list(loops) if loops[0].extent != 1 else []
    merged: list[Loop] = []
    kept = [loop for loop in loops if loop.extent != 1]
    for loop in sorted(kept, key=lambda loop: (loop.source, loop.target), reverse=True):
        last = merged[-1] if merged else None
        if last and (last.source, last.target) == (loop.source * loop.extent, loop.target * loop.extent):
            merged[-1] = Loop(last.extent * loop.extent, loop.source, loop.target)
        else:
            merged.append(loop)
    return merged


def disjoint(pieces: list[Piece]) -> list[Piece]:
    """Cut pieces so that none overlap; what was written later wins."""
    settled: list[Piece] = []
    for rows in _clusters([piece.box for piece in pieces]):
        group: list[Piece] = []
        for row in sorted(rows):
            new = pieces[row]
            group = [part for old in group for part in _minus(old, new.box)]
            group.append(new)
        settled += group
    return settled


def rounded_to(value: float, dtype: torch.dtype) -> float:
    """Return what memory of `dtype` holds after `value` was written to it."""
    return float(torch.tensor(value, dtype=dtype).item())


def _no_cast(content: Content, to: torch.dtype) -> str:
    if content.rounded:
        return f"a cast chain rounds to {content.dtype} before it ends in {to}"
    return f"a cast from {content.dtype} to {to} is the engine's to make"


def _minus(old: Piece, new: Box) -> list[Piece]:
    if old.box.intersect(new) is None:
        return [old]
    return [old.cut(box) for box in old.box.subtract(new)]


def _clusters(boxes: list[Box]) -> list[list[int]]:
    """Return rows in groups; boxes of different groups do not overlap. One pass per dim."""
    groups = [list(range(len(boxes)))]
    for dim in range(len(boxes[0].shape) if boxes else 0):
        groups = [part for group in groups for part in _split(boxes, group, dim)]
    return groups


def _split(boxes: list[Box], rows: list[int], dim: int) -> list[list[int]]:
    if len(rows) < 2:
        return [rows]
    parts: list[list[int]] = []
    end = -1
    for row in sorted(rows, key=lambda row: boxes[row].offsets[dim]):
        box = boxes[row]
        if box.offsets[dim] >= end:
            parts.append([])
        parts[-1].append(row)
        end = max(end, box.offsets[dim] + box.shape[dim])
    return parts


def _join(piece: Piece, want: PlacedBox, common: Box) -> Run:
    source = _element(piece.base, piece.strides, piece.box, common)
    target = _element(want.base, want.strides, want.box, common)
    loops = tuple(map(Loop, common.shape, piece.strides, want.strides))
    return Run(piece.content, source, target, loops)


def _element(base: int, strides: Shape, box: Box, inner: Box) -> int:
    return base + sum((b - a) * s for a, b, s in zip(box.offsets, inner.offsets, strides, strict=True))


def _dot(index: Shape, strides: Shape) -> int:
    return sum(i * s for i, s in zip(index, strides, strict=True))


def view_loops(sizes: Sequence[int], source: Sequence[int], target: Sequence[int]) -> tuple[Loop, ...]:
    """Return the loops of a copy between two views of equal sizes."""
    return tuple(map(Loop, sizes, source, target))


def num_elements(loops: Sequence[Loop]) -> int:
    """Return how many elements a copy moves."""
    return prod(loop.extent for loop in loops)
