"""The coordinator's side of `broadcast`: who gets which ring, and starting and cancelling the holders' work."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace import wire
from headrace.config import Deadlines
from headrace.errors import ConnectError, HeadraceError, PeerLostError, PlanError, TransferTimeoutError
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.plan import BroadcastPlan, TransferPlan
from headrace.planner import ReceiverNeeds
from headrace.server.switchboard import Peer, gather, tell
from headrace.transports.collective import serve_store

logger = logging.getLogger(__name__)
ABORT_S = 5.0
JOIN_S = 60.0


@dataclass(frozen=True)
class Placement:
    """Where the holders' rings lie.

    Attributes:
        served_by: Per receiver, the holder on its host whose ring it takes from; None if it takes no part.
        devices: Per holder, the uuid of the GPU whose memory its slots lie in; empty for host memory.
        why: For receivers on GPUs, one clause for the report: where slots lie, and why not on the GPU.
    """

    served_by: tuple[int | None, ...]
    devices: tuple[str, ...]
    why: str

    @classmethod
    def of(
        cls, served_by: Sequence[int | None], needs: Sequence[ReceiverNeeds], num_holders: int
    ) -> Placement:
        """Place slots on GPUs, if every holder serves one GPU and no two the same."""
        pairs = [(holder, need) for holder, need in zip(served_by, needs, strict=True) if holder is not None]
        served = [{need.device_uuid for h, need in pairs if h == holder} for holder in range(num_holders)]
        found = [uuid for uuids in served for uuid in uuids if uuid]
        problem = ""
        for holder, uuids in enumerate(served):
            if "" in uuids:
                problem = "an engine's worker is not on a GPU"
            elif len(uuids) != 1:
                problem = f"holder {holder} serves {len(uuids)} GPUs, not one: have one holder per GPU"
        if not problem and len(set(found)) < len(found):
            problem = "two holders serve the same GPU: have one holder per GPU"
        if not found:
            return cls(tuple(served_by), ("",) * num_holders, "")
        if problem:
            return cls(tuple(served_by), ("",) * num_holders, f"slots lie in host memory, since {problem}")
        return cls(tuple(served_by), tuple(uuids.pop() for uuids in served), "slots lie in GPU memory")

    def on_host(self, reason: str) -> Placement:
        """Return the placement in host memory instead."""
        why = f"slots lie in host memory, since {reason}"
        return replace(self, devices=("",) * len(self.devices), why=why)

    @property
    def transport(self) -> str | None:
        """What moves buckets to the receivers, where it is not what the plan says."""
        if not self.devices or not self.devices[0]:
            return None
        return "nccl" if len(self.devices) > 1 else "memory"


class RingHost:
    """What of the holders' broadcasts stays between updates: the group's rendezvous store, rings in GPU memory.

    The store is made anew when the group's members change or it broke.

    Args:
        bind_host: Address that this host's sockets listen on.
        advertise_host: Address that holders are told to dial.
    """

    def __init__(self, bind_host: str, advertise_host: str) -> None:
        self._hosts = (bind_host, advertise_host)
        self._store: object | None = None
        self._address = ""
        self._members: tuple[int, ...] = ()
        self._rings: dict[str, tuple[int, int]] = {}

    def address(self, members: Sequence[int]) -> str:
        """Return the store's address for holders with these process ids."""
        if self._store is None or self._members != tuple(members):
            self._store, self._address = serve_store(*self._hosts)
            self._members = tuple(members)
            self._rings = {}
        return self._address

    def broken(self) -> None:
        """Forget the group and its rings; the next broadcast makes new ones."""
        self._store = None
        self._rings = {}

    def note(self, needs: Sequence[ReceiverNeeds], placement: Placement, ring_bytes: int) -> None:
        """Keep in mind which rings holders keep on GPUs, and the budgets that they were made for."""
        budgets = {need.device_uuid: need.budget_bytes for need in needs}
        self._rings = {uuid: (ring_bytes, budgets[uuid]) for uuid in placement.devices if uuid}

    def on_gpus(self, devices: Sequence[str]) -> bool:
        """Return whether the holders keep rings on these GPUs."""
        return bool(self._rings) and set(devices) == set(self._rings)

    def budget_bytes(self, device_uuid: str, free_bytes: int) -> int:
        """Return a worker's budget: what it says is free, and the ring on its GPU, which the next one takes over.

        No more than when that ring was made, so the plan stays the same from update to update.
        """
        if device_uuid not in self._rings:
            return free_bytes
        ring_bytes, made_for = self._rings[device_uuid]
        return max(free_bytes, min(free_bytes + ring_bytes, made_for))


class BroadcastRun:
    """One update's broadcast: started before the stage, over when all receivers have taken every bucket.

    Attributes:
        placement: Where slots lie; final after `start`.
    """

    def __init__(
        self, plan: BroadcastPlan, holders: Sequence[Peer], rings: RingHost, placement: Placement
    ) -> None:
        self.placement = placement
        self._plan = plan
        self._holders = holders
        self._rings = rings
        self._has_begun = False
        self._is_cancelled = False

    def start(
        self,
        version: int,
        needs: Sequence[ReceiverNeeds],
        addresses: Sequence[HolderAddress],
        limits: Deadlines,
    ) -> list[wire.RingAddress | None]:
        """Have all holders make their rings, join the group and begin; returns each receiver's ring.

        Args:
            version: What to broadcast.
            needs: The receivers, in the placement's order.
            addresses: How to reach the holders, by index.
            limits: The update's deadlines.
        """
        ready = self._join(needs)
        deadline_s = limits.stage_s + limits.pause_s + limits.commit_s
        members = tuple(range(len(self._holders)))
        self._has_begun = True
        for member, peer in enumerate(self._holders):
            peer.send(
                wire.Broadcast(
                    version=version,
                    plan=self._plan,
                    member=member,
                    holder_of_member=members,
                    deadline_s=deadline_s,
                )
            )
        seen: Counter[int] = Counter()
        rings: list[wire.RingAddress | None] = []
        for holder in self.placement.served_by:
            if holder is None:
                rings.append(None)
                continue
            slots, signals = ready[holder]
            rings.append(wire.RingAddress(addresses[holder], slots, signals, seen[holder]))
            seen[holder] += 1
        return rings

    def noted(self, plan: TransferPlan) -> TransferPlan:
        """Return a receiver's plan as it is carried out: with where slots lie and what moves buckets into them."""
        placement = self.placement
        if plan.route != "broadcast" or not placement.why:
            return plan
        ring = replace(plan.ring, why=f"{plan.ring.why}; {placement.why}")
        return replace(plan, ring=ring, transport=placement.transport or plan.transport)

    def finish(self, deadline_s: float) -> None:
        """Wait until every holder has passed everything on."""
        gather(self._holders, wire.BroadcastDone, deadline_s, "broadcast")

    def cancel(self) -> HeadraceError | None:
        """Stop all holders and drop the group: a member may be inside a collective that never ends. Idempotent.

        Returns:
            Why a holder could not do its part, where that was what ended the broadcast.
        """
        if self._is_cancelled:
            return None
        self._is_cancelled = True
        try:
            causes = self._stop()
        finally:
            # Not before: members that wait for each other through the store would call its end the cause.
            self._rings.broken()
        return causes[0] if causes else None

    def _stop(self) -> list[HeadraceError]:
        live = tell(self._holders, wire.CancelBroadcast())
        limit = time.monotonic() + ABORT_S
        causes: list[HeadraceError] = []
        for peer in live if self._has_begun else ():
            try:
                peer.expect(wire.BroadcastDone, limit - time.monotonic(), "abort")
            except (PeerLostError, TransferTimeoutError) as error:
                logger.debug("the broadcast was stopped: %s", error)
            except HeadraceError as error:
                causes.append(error)
        return causes

    def _join(self, needs: Sequence[ReceiverNeeds]) -> list[tuple[SegmentDescriptor, SegmentDescriptor]]:
        """Have rings made and the group joined; on GPUs only where every holder can, which is asked first."""
        store = self._rings.address([getattr(peer.hello, "pid", 0) for peer in self._holders])
        if any(self.placement.devices) and not self._rings.on_gpus(self.placement.devices):
            refused = [(rank, answer.refused) for rank, answer in enumerate(self._ask("")) if answer.refused]
            if refused:
                reason = f"holder {refused[0][0]} cannot: {refused[0][1]}"
                logger.warning("broadcast through host memory: %s", reason)
                self.placement = self.placement.on_host(reason)
        rings = []
        for answer in self._ask(store):
            if answer.ring is None or answer.signals is None:
                self._rings.broken()
                raise ConnectError(
                    f"a holder's ring cannot be made any more: {answer.refused}", phase="stage"
                )
            rings.append((answer.ring, answer.signals))
        self._rings.note(needs, self.placement, self._ring_bytes)
        return rings

    @property
    def _ring_bytes(self) -> int:
        return max(1, self._plan.ring.slot_bytes * self._plan.ring.depth)

    def _ask(self, store: str) -> list[wire.RingReady]:
        receivers = Counter(holder for holder in self.placement.served_by if holder is not None)
        for rank, peer in enumerate(self._holders):
            peer.send(
                wire.JoinRing(
                    rank=rank,
                    world_size=len(self._holders),
                    store=store,
                    ring_bytes=self._ring_bytes,
                    num_receivers=receivers[rank],
                    device_uuid=self.placement.devices[rank],
                )
            )
        try:
            answers = gather(self._holders, wire.RingReady, JOIN_S, "join")
        except HeadraceError:
            self._rings.broken()
            raise
        return [answers[peer.key] for peer in self._holders]


def pair_with_holders(wanted: Sequence[bool], needs: Sequence[ReceiverNeeds]) -> list[int | None]:
    """Give each receiver that wants a broadcast a holder on its host, evenly; those of one GPU share one.

    Raises:
        PlanError: A receiver's host has no holder.
    """
    load: Counter[int] = Counter()
    of_gpu: dict[str, int] = {}
    served: list[int | None] = []
    for want, need in zip(wanted, needs, strict=True):
        if not want:
            served.append(None)
            continue
        if not need.reachable:
            text = f"{need.worker} has no holder on its host to take a broadcast from; start one there (torchrun)"
            raise PlanError(text, phase="stage")
        holder = of_gpu.get(need.device_uuid, -1) if need.device_uuid else -1
        if holder not in need.reachable:
            holder = min(need.reachable, key=lambda h: (load[h], h))
            of_gpu.setdefault(need.device_uuid, holder)
        load[holder] += 1
        served.append(holder)
    return served
