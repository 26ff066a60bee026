"""Which of the held regions a plan reads: what a trainer has to copy out of its memory, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.manifest import Manifest, SegmentDescriptor
from headrace.plan import CopyTable, UpdatePlan
from headrace.planner.join import all_dims, reaches
from headrace.types import I32, I64, ITEMSIZES


def planned_rows(plan: UpdatePlan, manifests: Sequence[Manifest]) -> list[I64]:
    """Return, per manifest, the rows of its regions that any copy of the plan reads, ascending."""
    used = [np.zeros(len(manifest.regions) + 1, np.int64) for manifest in manifests]
    places = [_Places(manifest) for manifest in manifests]
    for segments, holders, copies in _sources(plan):
        for block in np.unique(copies.src_block).tolist():
            holder = int(holders[block])
            rows = copies.take(copies.src_block == block)
            places[holder].count(segments[block], rows, used[holder])
    return [places[i].rows_of(counts) for i, counts in enumerate(used)]


def _sources(plan: UpdatePlan) -> list[tuple[tuple[SegmentDescriptor, ...], I32, CopyTable]]:
    """Return every table whose sources are segments of holders."""
    found = [
        (transfer.segments, transfer.segment_holder, transfer.reads)
        for transfer in plan.receivers
        if transfer.route != "broadcast"
    ]
    if plan.broadcast is not None:
        found.append((plan.broadcast.segments, plan.broadcast.segment_holder, plan.broadcast.fill))
    return found


class _Places:
    """One manifest's regions in the order of their first bytes, segment by segment."""

    def __init__(self, manifest: Manifest) -> None:
        regions = manifest.regions
        real = np.flatnonzero(all_dims(regions.shape > 0))
        self._order = real[np.lexsort((regions.base[real], regions.block[real]))]
        placed = regions.take(self._order)
        reach = reaches(np.maximum(placed.shape - 1, 0), placed.strides)
        self._base = placed.base
        self._last = placed.base + reach + ITEMSIZES[manifest.params.dtype_codes[placed.param]] - 1
        bounds = np.searchsorted(placed.block, np.arange(len(manifest.segments) + 1)).tolist()
        self._bounds = {s.segment_id: (bounds[i], bounds[i + 1]) for i, s in enumerate(manifest.segments)}

    def count(self, segment: SegmentDescriptor, copies: CopyTable, used: I64) -> None:
        """Mark every region that has a byte between a copy's first and last one: copies may span neighbours."""
        begin, end = self._bounds[segment.segment_id]
        last = copies.src_base + reaches(np.maximum(copies.shape - 1, 0), copies.src_strides)
        last += ITEMSIZES[copies.src_dtype] - 1
        reached = np.maximum.accumulate(self._last[begin:end])
        np.add.at(used, begin + np.searchsorted(reached, copies.src_base), 1)
        np.add.at(used, begin + np.searchsorted(self._base[begin:end], last, side="right"), -1)

    def rows_of(self, used: I64) -> I64:
        """Return the marked rows of the manifest."""
        return np.sort(self._order[np.cumsum(used)[: len(self._order)] > 0])
