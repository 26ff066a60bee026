"""The planner: `(manifests, needs, settings) -> UpdatePlan`, routes chosen, equal work done once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.config import UpdateSettings
from headrace.errors import ManifestMismatchError, PlanError
from headrace.manifest import Manifest
from headrace.plan import UpdatePlan
from headrace.planner.bodies import union_params
from headrace.planner.fit import check_fit
from headrace.planner.routes import Router
from headrace.planner.views import Receiver
from headrace.recipe import LoadRecipe
from headrace.types import ParamTable, WorkerId

_MOST_PLANS = 2


@dataclass(frozen=True, kw_only=True)
class ReceiverNeeds:
    """What the planner knows of one receiver.

    Attributes:
        worker: Who it is, for messages.
        recipe: What it needs.
        reachable: Indices of the manifests whose segments it can map: holders on its host.
        budget_bytes: Memory that staging may take at the receiver, opaque buffers included.
        device: Where its live tensors lie, as torch names it.
        reserved_bytes: Memory of that device that only the receiver stages in, beside the budget.
        device_uuid: That GPU, whatever processes number it; empty on a CPU.
    """

    worker: WorkerId
    recipe: LoadRecipe
    reachable: frozenset[int]
    budget_bytes: int
    device: str = "cpu"
    reserved_bytes: int = 0
    device_uuid: str = ""


class Planner:
    """Makes update plans and remembers the last two, so that equal layouts cost nothing. Not thread-safe."""

    def __init__(self) -> None:
        self._plans: OrderedDict[str, UpdatePlan] = OrderedDict()

    def plan(
        self, manifests: Sequence[Manifest], needs: Sequence[ReceiverNeeds], settings: UpdateSettings
    ) -> UpdatePlan:
        """Return what everyone does so that every needed byte arrives exactly once. Deterministic; no I/O.

        Args:
            manifests: What each holder has, all of one version; their positions are the holder indices.
            needs: One entry per receiver.
            settings: `route`, `transport`, `bucket_bytes` and `budget_bytes` matter.

        Raises:
            ManifestMismatchError: The source does not fit a recipe; lists all differences.
            UncoveredRegionError: Needed bytes are held by nobody; names them.
            CapacityError: A staging budget is too small.
            PlanError: The asked route or transport is impossible; says why and what would work.
        """
        _check_request(manifests, needs)
        receivers = [_receiver(need, settings) for need in needs]
        key = _key(manifests, receivers, settings)
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        params = union_params([manifest.params for manifest in manifests]) if manifests else ParamTable(())
        _check_all(manifests, needs, params)
        plan = Router(manifests, receivers, settings, params).plan()
        self._plans[key] = plan
        while len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)
        return plan


def _receiver(need: ReceiverNeeds, settings: UpdateSettings) -> Receiver:
    limit = (
        need.budget_bytes if settings.budget_bytes is None else min(need.budget_bytes, settings.budget_bytes)
    )
    on_gpu = need.device.startswith("cuda")
    reachable = tuple(sorted(need.reachable))
    return Receiver(str(need.worker), need.recipe, reachable, limit, need.reserved_bytes, on_gpu=on_gpu)


def _check_request(manifests: Sequence[Manifest], needs: Sequence[ReceiverNeeds]) -> None:
    if needs and not manifests:
        raise PlanError("no holder has published anything; start a holder and publish a version first")
    versions = sorted({manifest.version for manifest in manifests})
    if len(versions) > 1:
        raise PlanError(f"holders have different versions {versions}; publish one version on every holder")
    for need in needs:
        foreign = sorted(i for i in need.reachable if not 0 <= i < len(manifests))
        if foreign:
            raise PlanError(
                f"{need.worker} says it reaches holders {foreign}, of {len(manifests)}; enrol it again",
                name=str(need.worker),
            )


def _check_all(manifests: Sequence[Manifest], needs: Sequence[ReceiverNeeds], union: ParamTable) -> None:
    """Check every distinct recipe against what is held; manifests must agree about each parameter."""
    clashes = []
    for manifest in {m.params.key: m for m in manifests if m.params is not union}.values():
        for meta in () if manifest.params.key == union.key else manifest.params:
            other = union[union.index_of(meta.name)]
            if other != meta:
                clashes.append(f"{meta.name} is {meta.dtype}{meta.shape} and {other.dtype}{other.shape}")
    if clashes:
        raise ManifestMismatchError(
            f"holders disagree about {len(clashes)} parameters: {'; '.join(clashes[:10])}; "
            "publish the same model on every holder",
            clashes,
        )
    for recipe in {need.recipe.key: need.recipe for need in needs}.values():
        check_fit(recipe, union)


def _key(manifests: Sequence[Manifest], receivers: Sequence[Receiver], settings: UpdateSettings) -> str:
    """Digest of everything that a plan depends on; the version is not part of it."""
    digest = hashlib.sha256(f"{settings.route}|{settings.transport}|{settings.bucket_bytes}".encode())
    for manifest in manifests:
        digest.update(repr((manifest.layout_key, manifest.segments, manifest.holder)).encode())
    for receiver in receivers:
        room = receiver.budget_bytes, receiver.reserved_bytes, receiver.on_gpu
        digest.update(repr((receiver.recipe.key, receiver.reachable, room)).encode())
    return digest.hexdigest()
