"""The coordinator's side of `broadcast`: who gets which ring, and starting and cancelling the holders' work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from headrace import wire
from headrace.config import Deadlines
from headrace.errors import HeadraceError, PlanError
from headrace.manifest import HolderAddress
from headrace.plan import BroadcastPlan
from headrace.planner import ReceiverNeeds
from headrace.server.switchboard import Peer, gather
from headrace.transports.collective import serve_store

ABORT_S = 5.0
JOIN_S = 60.0


class RingHost:
    """The rendezvous store of the holders' broadcast group; made anew when its members change or it broke."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._store: object | None = None
        self._address = ""
        self._members: tuple[int, ...] = ()

    def address(self, members: Sequence[int]) -> str:
        """Return the store's address for holders with these process ids."""
        if self._store is None or self._members != tuple(members):
            self._store, self._address = serve_store(self._host)
            self._members = tuple(members)
        return self._address

    def broken(self) -> None:
        """Forget the group; the next broadcast makes a new one."""
        self._store = None


class BroadcastRun:
    """One update's broadcast: started before the stage, over when all receivers have taken every bucket."""

    def __init__(self, plan: BroadcastPlan, holders: Sequence[Peer], rings: RingHost) -> None:
        self._plan = plan
        self._holders = holders
        self._rings = rings

    def start(
        self,
        version: int,
        served_by: Sequence[int | None],
        addresses: Sequence[HolderAddress],
        limits: Deadlines,
    ) -> list[wire.RingAddress | None]:
        """Have all holders join the group, make their rings and begin; returns each receiver's ring.

        Args:
            version: What to broadcast.
            served_by: Per receiver, the holder on its host whose ring it takes from; None if it takes no part.
            addresses: How to reach the holders, by index.
            limits: The update's deadlines.
        """
        counts = Counter(holder for holder in served_by if holder is not None)
        ready = self._join(counts)
        deadline_s = limits.stage_s + limits.pause_s + limits.commit_s
        members = tuple(range(len(self._holders)))
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
        for holder in served_by:
            if holder is None:
                rings.append(None)
                continue
            answer = ready[holder]
            rings.append(wire.RingAddress(addresses[holder], answer.ring, answer.signals, seen[holder]))
            seen[holder] += 1
        return rings

    def finish(self, deadline_s: float) -> None:
        """Wait until every holder has passed everything on."""
        gather(self._holders, wire.BroadcastDone, deadline_s, "broadcast")

    def cancel(self) -> None:
        """Stop all holders and drop the group: a member may be inside a collective that never ends."""
        self._rings.broken()
        live = [peer for peer in self._holders if not peer.lost]
        for peer in live:
            peer.send(wire.CancelBroadcast())
        for peer in live:
            with suppress(HeadraceError):
                peer.expect(wire.BroadcastDone, ABORT_S, "abort")

    def _join(self, receivers: Counter[int]) -> list[wire.RingReady]:
        store = self._rings.address([getattr(peer.hello, "pid", 0) for peer in self._holders])
        ring = self._plan.ring
        for rank, peer in enumerate(self._holders):
            peer.send(
                wire.JoinRing(
                    rank=rank,
                    world_size=len(self._holders),
                    store=store,
                    ring_bytes=max(1, ring.slot_bytes * ring.depth),
                    num_receivers=receivers[rank],
                )
            )
        try:
            answers = gather(self._holders, wire.RingReady, JOIN_S, "join")
        except HeadraceError:
            self._rings.broken()
            raise
        return [answers[peer.key] for peer in self._holders]


def pair_with_holders(wanted: Sequence[bool], needs: Sequence[ReceiverNeeds]) -> list[int | None]:
    """Give each receiver that wants a broadcast a holder on its host, evenly.

    Raises:
        PlanError: A receiver's host has no holder.
    """
    load: Counter[int] = Counter()
    served: list[int | None] = []
    for want, need in zip(wanted, needs, strict=True):
        if not want:
            served.append(None)
            continue
        if not need.reachable:
            text = f"{need.worker} has no holder on its host to take a broadcast from; start one there (torchrun)"
            raise PlanError(text, phase="stage")
        holder = min(need.reachable, key=lambda h: (load[h], h))
        load[holder] += 1
        served.append(holder)
    return served
