"""Buckets: rows of a plan bound to memory, those that may run early apart from those that wait for the pause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from headrace.errors import IntegrityError
from headrace.geometry import dense_strides
from headrace.plan import MAPPED_MODES, CopyTable, TransferPlan, buffered, staged_bytes
from headrace.receiver.blocks import StagingArea
from headrace.segments.cuda import uuid_of
from headrace.transports.binding import Program, bind_copies
from headrace.types import I64, ITEMSIZES


@dataclass(frozen=True)
class Bucket:
    """One bucket's copies: those that may run early, into opaque and staging buffers, and those into live tensors.

    Attributes:
        opaque: Copies into what the loader will get.
        live: Copies into live tensors.
        live_rows: Rows of the plan that `live` copies.
        num_bytes: Bytes that `live` writes.
        staged: Copies into the staging buffer that `live` reads, if there is one.
        staged_rows: Rows of the plan that go by way of it.
        lasting: Whether all memory that it is bound to stays from one update to the next.
    """

    opaque: Program
    live: Program
    live_rows: I64
    num_bytes: int
    staged: Program | None = None
    staged_rows: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    lasting: bool = True

    def run_early(self, deadline_s: float) -> None:
        """Copy what needs no pause; done when this returns, as what it came from may be given back.

        Raises:
            TransferTimeoutError: Not within the deadline.
        """
        for program in (self.staged, self.opaque):
            if program is not None:
                program.run()
                program.finish(deadline_s)

    def differences(self) -> I64:
        """Return the rows of the plan whose live bytes, or what was staged for them, differ from the source."""
        found = self.live_rows[self.live.differences()]
        if self.staged is not None:
            found = np.union1d(found, self.staged_rows[self.staged.differences()])
        return found


def bucket_of(
    plan: TransferPlan,
    apply: CopyTable,
    bounds: tuple[int, int],
    sources: Sequence[torch.Tensor],
    blocks: list[torch.Tensor],
    *,
    undisturbed: bool,
) -> Bucket:
    """Bind rows `[begin, end)` of `apply`; `undisturbed` if nothing is fetched while they run."""
    begin, end = bounds
    is_opaque = apply.dst_block[begin:end] >= plan.num_targets
    rows = np.arange(begin, end)
    live = rows[~is_opaque]
    table = apply.take(live)
    return Bucket(
        opaque=bind_copies(apply.take(rows[is_opaque]), sources, blocks),
        live=bind_copies(table, sources, blocks, undisturbed=undisturbed, peers=_on_peers(plan, blocks)),
        live_rows=live,
        num_bytes=_live_bytes(table),
    )


def mapped_bucket(
    plan: TransferPlan,
    bounds: tuple[int, int],
    sources: Sequence[torch.Tensor],
    blocks: list[torch.Tensor],
    area: StagingArea,
) -> Bucket:
    """Bind copies out of mapped memory; where the plan buffers some, `staged` fills the buffer that `live` reads.

    Raises:
        CapacityError: There is no room for the buffer.
    """
    table = plan.apply.take(slice(*bounds))
    rows = np.flatnonzero(buffered(table, plan.ring.mode) & (table.dst_block < plan.num_targets))
    if not len(rows):
        return bucket_of(plan, plan.apply, bounds, sources, blocks, undisturbed=True)
    chosen = table.take(rows)
    sizes, itemsize = staged_bytes(chosen), ITEMSIZES[chosen.src_dtype]
    device = next((block.device for block in blocks if block.is_cuda), torch.device("cpu"))
    buffer = area.take(int(sizes.sum()), device)
    base, strides = np.cumsum(sizes) - sizes, dense_strides(chosen.shape, itemsize)
    first = np.zeros(len(rows), np.int32)
    fill = replace(
        chosen, dst_block=first, dst_base=base, dst_strides=strides, dst_dtype=chosen.src_dtype
    )
    rows += bounds[0]
    apply = replace(
        plan.apply,
        src_block=_with(plan.apply.src_block, rows, len(sources)),
        src_base=_with(plan.apply.src_base, rows, base),
        src_strides=_with(plan.apply.src_strides, rows, strides),
    )
    bucket = bucket_of(plan, apply, bounds, [*sources, buffer], blocks, undisturbed=True)
    staged = bind_copies(fill, sources, [buffer], gentle=True, peers=_on_peers(plan, blocks))
    return replace(bucket, staged=staged, staged_rows=rows, lasting=area.holds(buffer))


def _on_peers(plan: TransferPlan, blocks: Sequence[torch.Tensor]) -> frozenset[int]:
    """Return which sources of a plan that maps them lie on another GPU than the worker's."""
    device = next((block.device for block in blocks if block.is_cuda), None)
    if device is None or plan.ring.mode not in MAPPED_MODES:
        return frozenset()
    own = uuid_of(device)
    return frozenset(
        i for i, segment in enumerate(plan.segments) if segment.kind == "cuda" and segment.device_uuid != own
    )


def _with(column: np.ndarray, rows: I64, values: np.ndarray | int) -> np.ndarray:
    """Return a copy of a table's column with some rows replaced."""
    changed = column.copy()
    changed[rows] = values
    return changed


def bounds_of(plan: TransferPlan) -> list[tuple[int, int]]:
    """Return the rows of each bucket of `plan.apply`."""
    return list(pairwise(plan.apply_starts.tolist()))


def _live_bytes(table: CopyTable) -> int:
    return int((table.num_elements * ITEMSIZES[table.dst_dtype]).sum())


class Differences:
    """Turns rows that differ into an IntegrityError that names parameters."""

    def __init__(self, plan: TransferPlan, target_names: Sequence[str]) -> None:
        self._plan = plan
        self._names = target_names

    def check(self, bucket: Bucket) -> None:
        """Compare a bucket's live tensors with its sources.

        Raises:
            IntegrityError: Names the parameters that differ.
        """
        rows = bucket.differences()
        if len(rows):
            names = sorted({self._names[int(i)] for i in self._plan.apply.dst_block[rows]})
            message = (
                f"{len(names)} parameters differ from their source after the copy: {', '.join(names[:5])}"
            )
            raise IntegrityError(message, name=names[0], phase="verify")
