"""Which way bytes take to each receiver, and the plans that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar, cast

from headrace.config import UpdateSettings
from headrace.errors import PlanError, UncoveredRegionError
from headrace.manifest import Manifest
from headrace.plan import BroadcastPlan, DigestTable, TransferPlan, UpdatePlan
from headrace.planner.bodies import Body, Needed, Packed, Served, direct_body, may_serve, ring_body, serve
from headrace.planner.broadcast import Broadcast
from headrace.planner.digest_tables import param_ndims
from headrace.planner.holdings import Holdings
from headrace.planner.ring import check_reserved, device_bucket_bytes, mapped_ring
from headrace.planner.views import (
    COLLECTIVE,
    MAPPED,
    TCP,
    Receiver,
    View,
    Way,
    asked_way,
    bind,
    bind_broadcast,
)
from headrace.types import ParamTable

T = TypeVar("T")
Planned = tuple[TransferPlan, dict[int, DigestTable]]


class Router:
    """One planning run: chooses a route per receiver and makes equal tables once."""

    def __init__(
        self,
        manifests: Sequence[Manifest],
        receivers: Sequence[Receiver],
        settings: UpdateSettings,
        params: ParamTable,
    ) -> None:
        self._manifests = manifests
        self._receivers = receivers
        self._settings = settings
        self._params = params
        self._ndims = param_ndims(params)
        self._memo: dict[tuple[object, ...], object] = {}

    def plan(self) -> UpdatePlan:
        """Plan every receiver.

        Raises:
            PlanError: No way exists; says why and what would work.
        """
        way = asked_way(self._settings)
        if way == COLLECTIVE:
            return self._all_broadcast("the route broadcast was asked for")
        if way == MAPPED:
            planned = [self._mapped_or_raise(receiver) for receiver in self._receivers]
        elif way == "auto":
            return self._automatic()
        else:
            why = f"the transport {way} was asked for"
            planned = [self._copied(receiver, way, why) for receiver in self._receivers]
        return _update_plan(planned, None)

    def _automatic(self) -> UpdatePlan:
        found = [
            self._mapped(receiver, "all its bytes lie in memory of its host") for receiver in self._receivers
        ]
        rest = [i for i, planned in enumerate(found) if planned is None]
        if self._settings.route == "auto" and rest and self._can_broadcast(rest):
            why = f"its host holds only a part; {len(self._manifests)} holders have the rest between them"
            broadcast, planned = self._broadcast(rest, why)
            for i, one in zip(rest, planned, strict=True):
                found[i] = one
            return _update_plan(found, broadcast)
        why = "not all its bytes lie in memory of its host"
        return _update_plan(
            [p or self._copied(self._receivers[i], TCP, why) for i, p in enumerate(found)], None
        )

    def _can_broadcast(self, rest: Iterable[int]) -> bool:
        return len(self._manifests) > 1 and all(self._receivers[i].reachable for i in rest)

    # --- direct ---

    def _mapped(self, receiver: Receiver, why: str) -> Planned | None:
        """Return the plan over mapped memory, or None where not every byte can be mapped."""
        view = View.of(self._manifests, receiver.reachable)
        served = self._served(receiver, view)
        if served is None:
            return None
        limit = self._settings.bucket_bytes
        recipe = receiver.recipe
        body = self._once(("mapped", recipe.key, view.key), lambda: direct_body(served, recipe, limit))
        owned_bytes = self._needed(receiver).opaque_bytes - int(body.lent[:, 3].sum())
        check_reserved(owned_bytes, receiver.budget_bytes, receiver.name)
        if any(view.segments[i].kind == "host" for i in body.segments.tolist()):
            room = max(receiver.budget_bytes - owned_bytes, receiver.reserved_bytes)
            body = replace(body, ring=mapped_ring(body.apply, room, on_gpu=receiver.on_gpu))
        return self._bound(receiver, view, body, served, Way("direct", MAPPED, why))

    def _mapped_or_raise(self, receiver: Receiver) -> Planned:
        planned = self._mapped(receiver, "the transport memory was asked for")
        if planned is None:
            self._serve_by_anyone(receiver)
            raise PlanError(
                f"{receiver.name} cannot map all bytes it needs: {len(receiver.reachable)} of "
                f"{len(self._manifests)} holders are on its host and do not hold everything; use "
                f"transport {TCP} or route broadcast, or run a holder with the whole version on its host",
                name=receiver.name,
            )
        return planned

    def _copied(self, receiver: Receiver, transport: str, why: str) -> Planned:
        """Return the plan that reads holders through a ring."""
        usable = [
            i
            for i in range(len(self._manifests))
            if transport != TCP or self._manifests[i].holder.tcp_endpoint
        ]
        near = [i for i in usable if i in receiver.reachable]
        view = View.of(self._manifests, near, [i for i in usable if i not in receiver.reachable])
        served = self._served(receiver, view)
        if served is None:
            raise self._unreadable(receiver, transport, view)
        check_reserved(self._needed(receiver).opaque_bytes, receiver.budget_bytes, receiver.name)
        body = self._ring_body(receiver, view, served)
        return self._bound(receiver, view, body, served, Way("direct", transport, why))

    def _ring_body(self, receiver: Receiver, view: View, served: Served) -> Body:
        """Return tables for the receiver's budget; receivers whose budgets lead to equal rings share them."""
        key = (receiver.recipe.key, view.key)
        packed = self._packed(key, served, self._settings.bucket_bytes)
        ring = packed.ring(receiver.budget_bytes, self._needed(receiver).opaque_bytes)
        if ring.slot_bytes < packed.slot_bytes:
            packed = self._packed(key, served, ring.slot_bytes)
        ring = packed.settled(ring)
        body = self._once(("ring", *key, ring.slot_bytes), lambda: ring_body(served, packed, ring))
        return body if body.ring == ring else replace(body, ring=ring)

    def _packed(self, key: tuple[str, str], served: Served, limit_bytes: int) -> Packed:
        make = partial(Packed.of, served.src, served.holder, served.src_dtype, limit_bytes)
        return self._once(("packed", *key, limit_bytes), make)

    def _unreadable(self, receiver: Receiver, transport: str, view: View) -> PlanError:
        """Return why a copying transport cannot serve a receiver."""
        try:
            self._serve_by_anyone(receiver)
        except UncoveredRegionError as error:
            return error
        silent = [m.holder.holder_id for i, m in enumerate(self._manifests) if i not in view.holders]
        return PlanError(
            f"{receiver.name} needs bytes of holders that serve no {transport} endpoint: "
            f"{', '.join(silent[:10])}; start them with a data server, or run a holder on its host",
            name=receiver.name,
        )

    def _everyone(self) -> View:
        return View.of(self._manifests, range(len(self._manifests)))

    def _serve_by_anyone(self, receiver: Receiver) -> Served:
        return serve(self._needed(receiver), self._holdings(self._everyone()))

    def _served(self, receiver: Receiver, view: View) -> Served | None:
        def attempt() -> Served | None:
            if not may_serve(self._needed(receiver), self._holdings(view).boxes):
                return None
            try:
                return serve(self._needed(receiver), self._holdings(view))
            except UncoveredRegionError:
                return None

        return self._once(("served", receiver.recipe.key, view.key), attempt)

    def _bound(self, receiver: Receiver, view: View, body: Body, served: Served, way: Way) -> Planned:
        make = partial(served.digests, self._needed(receiver), view.segment_start)
        return bind(receiver, view, body, way), self._digests(("direct", receiver.recipe.key), view, make)

    def _digests(
        self, key: tuple[str, str], view: View, make: Callable[[], dict[int, DigestTable]]
    ) -> dict[int, DigestTable]:
        """Return digest tables by holder index; receivers with equal needs and holders share the dict."""
        made = self._once(("digests", *key, view.key), make)
        named = partial(lambda tables: {view.holders[i]: table for i, table in tables.items()}, made)
        return self._once(("named digests", *key, view.key, view.holders), named)

    # --- broadcast ---

    def _all_broadcast(self, why: str) -> UpdatePlan:
        alone = [r.name for r in self._receivers if not r.reachable]
        if alone:
            raise PlanError(
                f"broadcast needs a holder on every receiver's host; {', '.join(alone[:10])} reach none: use "
                f"transport {TCP}, or run a holder there",
                name=alone[0],
            )
        if not self._receivers:
            return UpdatePlan((), None, ())
        broadcast, planned = self._broadcast(range(len(self._receivers)), why)
        return _update_plan(planned, broadcast)

    def _broadcast(self, members: Iterable[int], why: str) -> tuple[BroadcastPlan, list[Planned]]:
        receivers = [self._receivers[i] for i in members]
        for receiver in receivers:
            check_reserved(self._needed(receiver).opaque_bytes, receiver.budget_bytes, receiver.name)
        view = self._everyone()
        needs = {receiver.recipe.key: self._needed(receiver) for receiver in receivers}
        room = min(r.budget_bytes - needs[r.recipe.key].opaque_bytes for r in receivers)
        bucket_bytes = self._settings.bucket_bytes
        if all(receiver.on_gpu for receiver in receivers):
            bucket_bytes = device_bucket_bytes(bucket_bytes, room)
        shared = Broadcast.of(list(needs.values()), self._holdings(view), bucket_bytes, room)
        self._memo.pop(("holdings", view.key), None)  # as large as all manifests, and not needed again
        salt = ",".join(sorted(needs))
        bodies = {recipe: shared.body(needed) for recipe, needed in needs.items()}
        shared = shared.without_slots()  # as large as all manifests too
        planned = []
        for receiver in receivers:
            recipe = receiver.recipe.key
            make = partial(shared.digests, needs[recipe], view.segment_start)
            transfer = bind(receiver, view, bodies[recipe], Way("broadcast", COLLECTIVE, why), salt)
            planned.append((transfer, self._digests(("broadcast", recipe), view, make)))
        return bind_broadcast(shared, view), planned

    # --- made once ---

    def _needed(self, receiver: Receiver) -> Needed:
        recipe = receiver.recipe
        return self._once(("needed", recipe.key), lambda: Needed.of(recipe, self._params, self._ndims))

    def _holdings(self, view: View) -> Holdings:
        manifests = [self._manifests[i] for i in view.holders]
        return self._once(("holdings", view.key), lambda: Holdings.of(manifests, self._params, view.num_near))

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        if key not in self._memo:
            self._memo[key] = make()
        return cast(T, self._memo[key])


def _update_plan(planned: Sequence[Planned | None], broadcast: BroadcastPlan | None) -> UpdatePlan:
    made = [one for one in planned if one is not None]
    return UpdatePlan(tuple(plan for plan, _ in made), broadcast, tuple(digests for _, digests in made))
