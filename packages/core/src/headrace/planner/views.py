"""Which holders a receiver asks, in which order, and how tables are bound to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from headrace.config import UpdateSettings
from headrace.errors import PlanError
from headrace.manifest import Manifest, SegmentDescriptor
from headrace.plan import BroadcastPlan, TransferPlan
from headrace.planner.bodies import Body
from headrace.planner.broadcast import Broadcast
from headrace.recipe import LoadRecipe
from headrace.types import I32, I64

MAPPED = "memory"
TCP = "tcp"
COLLECTIVE = "collective"


@dataclass(frozen=True)
class Way:
    """How bytes reach one receiver: route, transport, and the sentence that says why."""

    route: str
    transport: str
    why: str


@dataclass(frozen=True)
class Receiver:
    """One receiver as the router sees it; `name` is for messages."""

    name: str
    recipe: LoadRecipe
    reachable: tuple[int, ...]
    budget_bytes: int
    reserved_bytes: int = 0
    on_gpu: bool = False


@dataclass(frozen=True)
class View:
    """Holders in the order that a receiver prefers them; receivers whose views have equal keys share tables.

    Attributes:
        holders: Holder indices, those on the receiver's host first.
        num_near: How many are on its host.
        segments: The holders' segments, one after another.
        segment_holder: Holder index of each, shape (len(segments),).
        segment_start: First segment of each holder, shape (len(holders),).
        key: Layouts of the holders in this order.
    """

    holders: tuple[int, ...]
    num_near: int
    segments: tuple[SegmentDescriptor, ...]
    segment_holder: I32
    segment_start: I64
    key: str

    @classmethod
    def of(cls, manifests: Sequence[Manifest], near: Sequence[int], far: Sequence[int] = ()) -> View:
        """Put holders in order."""
        holders = (*near, *far)
        counts = [len(manifests[i].segments) for i in holders]
        layouts = ",".join(manifests[i].layout_key for i in holders)
        return cls(
            holders=holders,
            num_near=len(near),
            segments=tuple(segment for i in holders for segment in manifests[i].segments),
            segment_holder=np.repeat(np.array(holders, np.int32), counts),
            segment_start=np.array([0, *accumulate(counts)][: len(holders)], np.int64),
            key=hashlib.sha256(f"{len(near)}:{layouts}".encode()).hexdigest(),
        )


def asked_way(settings: UpdateSettings) -> str:
    """Return `auto`, `memory`, `collective`, or the name of a copying transport.

    Raises:
        PlanError: Route and transport contradict each other, or nothing offers the route.
    """
    route, transport = settings.route, settings.transport
    if route == "p2p":
        raise PlanError(
            "route p2p: no installed transport offers it; use route direct with transport tcp, or auto",
            name="route",
        )
    if route == "broadcast":
        if transport not in ("auto", COLLECTIVE):
            raise PlanError(
                f"route broadcast goes over transport {COLLECTIVE}, not {transport}; leave it at auto, "
                f"or use route direct with {transport}",
                name="transport",
            )
        return COLLECTIVE
    if route == "direct" and transport == COLLECTIVE:
        raise PlanError(
            f"route direct cannot use transport {COLLECTIVE}; use route broadcast, or {MAPPED} or {TCP}",
            name="transport",
        )
    return transport


def bind(receiver: Receiver, view: View, body: Body, way: Way, salt: str = "") -> TransferPlan:
    """Return a body's plan over one view's holders."""
    holders = np.array([*view.holders, -1], np.int32)
    segments = tuple(view.segments[i] for i in body.segments.tolist())
    named = view.segments if way.route == "broadcast" else segments
    ring = body.ring
    facts = (
        (receiver.recipe.key, view.key, view.holders, way.route, way.transport, salt),
        (ring.mode, ring.slot_bytes, ring.depth, body.key),
        [segment.segment_id for segment in named],
    )
    return TransferPlan(
        route=way.route,
        transport=way.transport,
        why=way.why,
        segments=segments,
        segment_holder=view.segment_holder[body.segments],
        fill=body.fill,
        fill_starts=body.fill_starts,
        apply=body.apply,
        apply_starts=body.apply_starts,
        bucket_owner=holders[body.bucket_owner],
        bucket_bytes=body.bucket_bytes,
        opaque=receiver.recipe.opaque,
        num_targets=len(receiver.recipe.targets),
        num_bytes=body.num_bytes,
        ring=ring,
        lent=body.lent,
        key=hashlib.sha256(repr(facts).encode()).hexdigest()[:32],
    )


def bind_broadcast(shared: Broadcast, view: View) -> BroadcastPlan:
    """Return what one view's holders broadcast."""
    packing = shared.packing
    holders = np.array(view.holders, np.int32)
    return BroadcastPlan(
        segments=tuple(view.segments[i] for i in shared.segments.tolist()),
        segment_holder=view.segment_holder[shared.segments],
        fill=shared.fill,
        fill_starts=shared.fill_starts,
        bucket_owner=holders[packing.owner],
        bucket_bytes=packing.num_bytes,
        ring=shared.ring,
    )
