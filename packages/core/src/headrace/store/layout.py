"""Where each region of a version lies in host segments, and what is read in one task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.errors import ManifestMismatchError
from headrace.geometry import Box, RegionTable, contiguous_strides
from headrace.protocols import Slot, SourceRegion
from headrace.types import DTYPES, ParamTable, dtype_code

ALIGN = 64
SEGMENT_BYTES = 4 << 30
TASK_BYTES = 32 << 20


@dataclass(frozen=True)
class Layout:
    """Places of all regions that one holder keeps of a version; equal layouts share segments over versions.

    Attributes:
        params: All parameters of the model.
        regions: What the holder has.
        slots: One per region, dense, at multiples of `ALIGN`.
        segment_bytes: Size of each segment.
    """

    params: ParamTable
    regions: tuple[SourceRegion, ...]
    slots: tuple[Slot, ...]
    segment_bytes: tuple[int, ...]

    @classmethod
    def of(cls, params: ParamTable, regions: Sequence[SourceRegion], limit: int = SEGMENT_BYTES) -> Layout:
        """Place `regions` one after the other, opening a new segment where `limit` would be passed.

        Raises:
            ManifestMismatchError: Regions name unknown parameters or boxes outside them; lists all.
        """
        _check(params, regions)
        slots: list[Slot] = []
        sizes: list[int] = []
        for region in regions:
            meta = params[params.index_of(region.name) or 0]
            num_bytes = region.box.num_elements * DTYPES[dtype_code(meta.dtype)].itemsize
            room = -(-num_bytes // ALIGN) * ALIGN
            if not sizes or (sizes[-1] and sizes[-1] + room > limit):
                sizes.append(0)
            slots.append(Slot(region, len(sizes) - 1, sizes[-1], num_bytes))
            sizes[-1] += room
        return cls(params, tuple(regions), tuple(slots), tuple(max(size, ALIGN) for size in sizes))

    @property
    def num_bytes(self) -> int:
        """Bytes of all regions, without the gaps between them."""
        return sum(slot.num_bytes for slot in self.slots)

    def region_table(self) -> RegionTable:
        """Return the regions as a manifest lists them."""
        rows = []
        for slot in self.slots:
            index = self.params.index_of(slot.region.name) or 0
            size = DTYPES[dtype_code(self.params[index].dtype)].itemsize
            box = slot.region.box
            rows.append((index, box, slot.segment, slot.begin, contiguous_strides(box.shape, size)))
        return RegionTable.from_rows(rows, self.params.max_ndim)

    def tasks(self, *, cut: bool, task_bytes: int = TASK_BYTES) -> Iterator[list[Slot]]:
        """Yield what to read together: small regions joined, large ones cut in their first dim if `cut`."""
        task: list[Slot] = []
        size = 0
        for whole in self.slots:
            for slot in _cut(whole, task_bytes) if cut else (whole,):
                if task and size + slot.num_bytes > task_bytes:
                    yield task
                    task, size = [], 0
                task.append(slot)
                size += slot.num_bytes
        if task:
            yield task


def _cut(slot: Slot, limit: int) -> Iterator[Slot]:
    box = slot.region.box
    if slot.num_bytes <= limit or not box.shape or box.shape[0] < 2:
        yield slot
        return
    row_bytes = slot.num_bytes // box.shape[0]
    step = max(1, limit // row_bytes)
    for row in range(0, box.shape[0], step):
        count = min(step, box.shape[0] - row)
        part = Box((box.offsets[0] + row, *box.offsets[1:]), (count, *box.shape[1:]))
        region = SourceRegion(slot.region.name, part)
        yield Slot(region, slot.segment, slot.begin + row * row_bytes, count * row_bytes)


def _check(params: ParamTable, regions: Sequence[SourceRegion]) -> None:
    problems = []
    for region in regions:
        index = params.index_of(region.name)
        if index is None:
            problems.append(f"{region.name}: not in the metadata")
            continue
        shape, box = params[index].shape, region.box
        inside = len(box.shape) == len(box.offsets) == len(shape) and all(
            o >= 0 and n >= 0 and o + n <= e for o, n, e in zip(box.offsets, box.shape, shape, strict=True)
        )
        if not inside:
            problems.append(f"{region.name}: {box} is not inside its shape {shape}")
    if problems:
        shown = "; ".join(problems[:10])
        raise ManifestMismatchError(f"the source contradicts itself: {shown}", problems)
