"""The PlanReport: what an update would move where, and why, as data; rendering lives in `cli/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.manifest import Manifest
from headrace.plan import BroadcastPlan, TransferPlan, UpdatePlan
from headrace.planner import casts
from headrace.recipe import LoadRecipe
from headrace.types import I32, ITEMSIZES, WorkerId


@dataclass(frozen=True, kw_only=True)
class PlannedWorker:
    """What one worker would do.

    Attributes:
        worker: Instance and rank.
        route: Route of its plan.
        transport: What would move the bytes.
        why: Why this route, one sentence.
        ring: Ring mode and why, one sentence.
        num_bytes: Bytes that would reach it.
        live_bytes: Bytes that would be written into its live tensors inside the pause.
        from_holders: Bytes from each holder, by position in `PlanReport.holders`.
        num_copies: Copies it would make, into slots and into live tensors.
        num_buckets: Buckets they come in.
        opaque: Source names that would go through the engine's own loader.
        opaque_reasons: Why, by live tensor.
        casts: `from->to` dtype casts.
    """

    worker: WorkerId
    route: str
    transport: str
    why: str
    ring: str
    num_bytes: int
    live_bytes: int
    from_holders: dict[int, int]
    num_copies: int
    num_buckets: int
    opaque: tuple[str, ...]
    opaque_reasons: dict[str, str]
    casts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What one update would do.

    Attributes:
        version: Version that it would make.
        holders: Name and held bytes of each holder.
        workers: One entry per worker.
        unused_names: Source names that nothing uses.
        plan_s: Seconds that planning took.
    """

    version: int
    holders: tuple[tuple[str, int], ...]
    workers: tuple[PlannedWorker, ...]
    unused_names: tuple[str, ...]
    plan_s: float

    @property
    def num_bytes(self) -> int:
        """Bytes over all workers."""
        return sum(worker.num_bytes for worker in self.workers)


def plan_report(
    manifests: Sequence[Manifest],
    needs: Sequence[tuple[WorkerId, LoadRecipe]],
    plan: UpdatePlan,
    *,
    version: int,
    plan_s: float,
) -> PlanReport:
    """Return what `plan` does, in the order of `needs`."""
    unused = [{recipe.sources[int(i)].name for i in recipe.unused} for _, recipe in needs]
    return PlanReport(
        version=version,
        holders=tuple((manifest.holder.holder_id, _held_bytes(manifest)) for manifest in manifests),
        workers=tuple(
            _planned(worker, recipe, transfer, plan.broadcast)
            for (worker, recipe), transfer in zip(needs, plan.receivers, strict=True)
        ),
        unused_names=tuple(sorted(set.intersection(*unused))) if unused else (),
        plan_s=plan_s,
    )


def live_bytes(recipe: LoadRecipe, plan: TransferPlan) -> int:
    """Return what a plan's copies write into live tensors, and what the loader is given for the others."""
    into_live = plan.apply.dst_block < plan.num_targets
    copied = (plan.apply.num_elements * ITEMSIZES[plan.apply.dst_dtype])[into_live].sum()
    loaded = sum(recipe.sources.num_bytes[plan.opaque].tolist())
    return int(copied) + int(loaded)


def _planned(
    worker: WorkerId, recipe: LoadRecipe, plan: TransferPlan, broadcast: BroadcastPlan | None
) -> PlannedWorker:
    return PlannedWorker(
        worker=worker,
        route=plan.route,
        transport=plan.transport,
        why=plan.why,
        ring=f"{plan.ring.mode}: {plan.ring.why}",
        num_bytes=plan.num_bytes,
        live_bytes=live_bytes(recipe, plan),
        from_holders=_bytes_by_holder(plan, broadcast),
        num_copies=len(plan.fill) + len(plan.apply),
        num_buckets=plan.num_buckets,
        opaque=tuple(recipe.sources[int(i)].name for i in plan.opaque),
        opaque_reasons=recipe.opaque_reasons,
        casts=casts(recipe),
    )


def _bytes_by_holder(plan: TransferPlan, broadcast: BroadcastPlan | None) -> dict[int, int]:
    """Return how many bytes each holder gives: its segments' copies, or the buckets it owns in a broadcast."""
    owners: I32 = plan.segment_holder
    copies = plan.reads
    if plan.route == "broadcast" and broadcast is not None:
        owners, copies = broadcast.segment_holder, broadcast.fill
    if not len(copies):
        return {}
    sizes = copies.num_elements * ITEMSIZES[copies.src_dtype]
    sums = np.bincount(owners[copies.src_block], sizes).astype(np.int64)
    return {holder: int(sums[holder]) for holder in np.flatnonzero(sums).tolist()}


def _held_bytes(manifest: Manifest) -> int:
    items = ITEMSIZES[manifest.params.dtype_codes[manifest.regions.param]]
    return int((manifest.regions.num_elements * items).sum())
