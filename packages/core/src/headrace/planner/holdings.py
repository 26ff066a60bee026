"""What some holders have together: one table, its distinct boxes, and the choice among replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from headrace.errors import ManifestMismatchError
from headrace.geometry import RegionTable
from headrace.manifest import Manifest
from headrace.planner.join import BoxIndex, Mask, all_dims, fit_width, reaches
from headrace.types import I32, I64, ITEMSIZES, ParamTable


@dataclass(frozen=True)
class Holdings:
    """Regions of several holders in one parameter table, and which of them are replicas of one box.

    Attributes:
        regions: All rows, replicas of a box next to each other; `block` counts the segments of all holders.
        holder: Position of each row's holder among the holders asked, shape (N,).
        boxes: The distinct boxes.
        starts: Box `i` lies at rows `[starts[i], starts[i + 1])`, holders ascending; shape (len(boxes) + 1,).
        num_near: The first so many holders are preferred.
        num_holders: Number of holders asked.
    """

    regions: RegionTable
    holder: I32
    boxes: BoxIndex
    starts: I64
    num_near: int
    num_holders: int

    @classmethod
    def of(cls, manifests: Sequence[Manifest], params: ParamTable, num_near: int) -> Self:
        """Collect manifests, the preferred ones first, into `params`' ids.

        Raises:
            ManifestMismatchError: A region reaches out of its parameter or of its segment.
        """
        tables, first_segment = [], 0
        for manifest in manifests:
            tables.append(_renamed(manifest, params, first_segment))
            first_segment += len(manifest.segments)
        table = RegionTable.concat(tables)
        holder = np.repeat(np.arange(len(tables), dtype=np.int32), [len(t) for t in tables])
        order = _box_order(table)
        table, holder = table.take(order), holder[order]
        new = _first_of_box(table)
        starts = np.append(np.flatnonzero(new), len(table))
        boxes = BoxIndex.build(table.param[new], table.offsets[new], table.shape[new], len(params))
        return cls(table, holder, boxes, starts, num_near, len(manifests))

    def choose(self, weights: I64) -> I64:
        """Return one row per box: a preferred holder's if any has it, then so that `weights` (bytes) balance.

        Deterministic. Boxes with equal candidates are dealt out in runs: each holder reads in sequence.
        """
        chosen = self.starts[:-1].copy()
        many = np.flatnonzero(np.diff(self.starts) > 1)
        if not len(many):
            return chosen
        rows = self.rows_by_holder(many)
        loads = np.bincount(self.holder[chosen], weights, self.num_holders).astype(np.float64)
        loads -= np.bincount(self.holder[chosen[many]], weights[many], self.num_holders)
        for members in _groups(rows >= 0):
            holders = np.flatnonzero(rows[members[0]] >= 0)
            wanted = weights[many[members]].astype(np.float64)
            edges = np.cumsum(_quotas(loads[holders], float(wanted.sum())))
            pick = np.searchsorted(edges[:-1], np.cumsum(wanted) - wanted / 2, side="right")
            loads[holders] += np.bincount(pick, wanted, len(holders))
            chosen[many[members]] = rows[members, holders[pick]]
        return chosen

    def rows_by_holder(self, boxes: I64) -> I64:
        """Return the row of each box at each candidate, -1 elsewhere, shape (len(boxes), num_holders)."""
        counts = np.diff(self.starts)[boxes]
        box = np.repeat(np.arange(len(boxes)), counts)
        row = np.arange(len(box)) + np.repeat(self.starts[boxes] - np.cumsum(counts) + counts, counts)
        out = np.full((len(boxes), self.num_holders), -1, np.int64)
        out[box[::-1], self.holder[row][::-1]] = row[::-1]
        near = (out[:, : self.num_near] >= 0).any(axis=1)
        out[near, self.num_near :] = -1
        return out


def _renamed(manifest: Manifest, params: ParamTable, first_segment: int) -> RegionTable:
    """Return a manifest's rows that hold something, in `params`' ids and a common count of segments."""
    table = fit_width(manifest.regions, max(params.max_ndim, manifest.params.max_ndim))
    _check_bounds(manifest, table)
    same = manifest.params is params or manifest.params.key == params.key
    ids = np.arange(len(params), dtype=np.int32) if same else manifest.params.ids_in(params)
    param = ids[table.param]
    keep = all_dims(table.shape > 0) & (param >= 0)
    block = table.block + np.int32(first_segment)
    named = RegionTable(param, table.offsets, table.shape, block, table.base, table.strides)
    return fit_width(named if keep.all() else named.take(keep), params.max_ndim)


def _check_bounds(manifest: Manifest, table: RegionTable) -> None:
    params, sizes = manifest.params, np.array([s.num_bytes for s in manifest.segments], np.int64)
    bad: Mask = (
        (table.param < 0) | (table.param >= len(params)) | (table.block < 0) | (table.block >= len(sizes))
    )
    if not bad.any() and len(table):
        extents = np.ones((len(params), table.ndim), np.int64)
        extents[:, : params.max_ndim] = params.shapes
        bad = ~all_dims((table.offsets >= 0) & (table.shape >= 0))
        bad |= ~all_dims(table.offsets + table.shape <= extents[table.param])
        reach = reaches(np.maximum(table.shape - 1, 0), table.strides)
        end = table.base + reach + ITEMSIZES[params.dtype_codes[table.param]]
        outside = (table.base < 0) | ~all_dims(table.strides >= 0) | (end > sizes[table.block])
        bad |= outside & all_dims(table.shape > 0)
    if bad.any():
        ids = table.param[bad]
        names = [params[i].name if 0 <= i < len(params) else f"parameter {i}" for i in ids[:10].tolist()]
        raise ManifestMismatchError(
            f"holder {manifest.holder.holder_id}: {len(ids)} regions reach out of their parameter or "
            f"segment: {', '.join(names)}; publish again with a manifest that fits its segments",
            names,
            name=names[0],
        )


def _box_order(table: RegionTable) -> I64:
    """Return the order that sorts by (param, offsets, shape); ties keep their order."""
    step = np.diff(table.param)
    if (step > 0).all():
        return np.arange(len(table))
    dims: list[I64] = [c[:, d] for c in (table.shape, table.offsets) for d in reversed(range(table.ndim))]
    keys = [key for key in dims if (key != key[0]).any()]
    order: I64 = np.lexsort(np.stack([*keys, table.param]))
    return order


def _first_of_box(table: RegionTable) -> Mask:
    new = np.ones(len(table), np.bool_)
    new[1:] = (
        (table.param[1:] != table.param[:-1])
        | ~all_dims(table.offsets[1:] == table.offsets[:-1])
        | ~all_dims(table.shape[1:] == table.shape[:-1])
    )
    return new


def _groups(candidates: Mask) -> list[I64]:
    """Return the rows with equal candidate sets, the sets with the fewest candidates first."""
    bits = np.packbits(candidates, axis=1)
    _, inverse = np.unique(bits, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    order = np.argsort(inverse, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)
    return sorted(groups, key=lambda rows: (int(candidates[rows[0]].sum()), int(rows[0])))


def _quotas(loads: npt.NDArray[np.float64], total: float) -> npt.NDArray[np.float64]:
    """Return how much each holder gets of `total` so that the loads become as equal as they can."""
    ordered = np.sort(loads)
    counts = np.arange(1, len(loads) + 1)
    levels = (total + np.cumsum(ordered)) / counts
    fits = np.flatnonzero(levels >= ordered)
    quotas: npt.NDArray[np.float64] = np.maximum(levels[fits[-1]] - loads, 0.0)
    return quotas
