"""One update's life: enrol, publish, describe, plan, stage, then each instance's pause - or the way back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from secrets import token_hex
from typing import TypeVar

import numpy as np

from headrace import wire
from headrace.config import EngineTarget, UpdateSettings
from headrace.control.keys import new_token
from headrace.errors import (
    CapacityError,
    ConfigError,
    HeadraceError,
    LocalProtocolError,
    ManifestMismatchError,
)
from headrace.manifest import HolderAddress, Manifest
from headrace.plan import UpdatePlan
from headrace.planner import Planner, ReceiverNeeds, planned_rows
from headrace.protocols import EngineControl, Ticket
from headrace.recipe import LoadRecipe
from headrace.server.barrier import choose_barriers
from headrace.server.broadcast import BroadcastRun, Placement, RingHost, pair_with_holders
from headrace.server.commit import Instance, Member, commit_instance, take_back
from headrace.server.describing import Descriptions
from headrace.server.guardian import Guardian
from headrace.server.holders import HolderPool, ProgressCallback
from headrace.server.switchboard import Peer, Switchboard, gather
from headrace.server.versions import next_version
from headrace.telemetry import Recorder
from headrace.types import ParamTable

logger = logging.getLogger(__name__)
T = TypeVar("T")
BEGIN_S = 10.0
FINISH_S = 10.0
SETTLE_S = 10.0
SIGNALS_S = 0.1
_PARTIAL = (
    "does the address reach all workers that the engine counts? One of several fronts of data-parallel engines "
    "(external or hybrid load balancing) does not, and cannot be updated"
)


@dataclass(frozen=True)
class Kept:
    """What stays between the updates of one parameter server."""

    switchboard: Switchboard
    holders: HolderPool
    planner: Planner
    guardian: Guardian
    recipes: dict[str, LoadRecipe]
    rings: RingHost


class Update:
    """Carries one update through. Used once; lives in the updater.

    A failure before the first byte leaves every engine serving the old weights; afterwards the error's
    `weights_state` says what the engine holds.
    """

    def __init__(
        self,
        kept: Kept,
        controls: Sequence[tuple[EngineControl, EngineTarget | None]],
        settings: UpdateSettings,
        metas: Callable[[], ParamTable],
        num_holders: int | None,
        progress: ProgressCallback,
    ) -> None:
        self.id = token_hex(6)
        self.version = -1
        self.step: int | None = None
        self.recorder = Recorder("updater")
        self.instances = [Instance(control, target, new_token(), self.id) for control, target in controls]
        self._kept = kept
        self._settings = settings
        self._num_holders = num_holders
        self._progress = progress
        self._descriptions = Descriptions(kept.recipes, kept.rings, settings, metas)
        self._needs: list[ReceiverNeeds] = []
        self._broadcast: BroadcastRun | None = None
        self._calls = ThreadPoolExecutor(max_workers=2 * len(controls), thread_name_prefix="headrace-engine")

    @property
    def members(self) -> list[Member]:
        """All receivers, instance by instance, by rank."""
        return [member for instance in self.instances for member in instance.members]

    @property
    def first(self) -> bool:
        """Whether a receiver met this source for the first time."""
        return self._descriptions.first

    @property
    def holder_peers(self) -> list[Peer]:
        """The holders' conversations."""
        return self._kept.holders.peers

    def run(self) -> None:
        """Do it all; returns when every instance serves the new version.

        Raises:
            HeadraceError: It failed; the message and `weights_state` say what is served now.
        """
        with self._ending():
            peers = self._enrol()
            manifests = self._publish(peers)
            self._describe(peers, [manifest.holder for manifest in manifests])
            plan = self._make_plan(manifests)
            choose_barriers(self.instances, self._settings)
            self._fill(plan, manifests)
            self._stage(plan, manifests)
            self._commit()

    def plan_only(self) -> tuple[UpdatePlan, list[Manifest]]:
        """Go as far as the plan, then have everyone forget it: nothing is staged, no engine is paused.

        Raises:
            HeadraceError: The update would fail for this reason.
        """
        with self._ending():
            peers = self._enrol()
            manifests = self._publish(peers)
            self._describe(peers, [manifest.holder for manifest in manifests])
            plan = self._make_plan(manifests)
            self._take_back(HeadraceError("only the plan was asked for"))
            return plan, manifests

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Take everything back if the body fails, and let go of the receivers in any case."""
        try:
            yield
        except HeadraceError as error:
            error.update_id, error.weight_version = self.id, self.version
            logger.info("update %s failed: %s", self.id, error)
            self._take_back(error)
            raise
        except BaseException as error:
            # Ctrl-C, or a fault of ours: whatever it was, engines are not left paused by it.
            self._take_back(HeadraceError(f"the update was broken off by {type(error).__name__}"))
            raise
        finally:
            self._kept.switchboard.forget([peer for instance in self.instances for peer in instance.peers])
            self._calls.shutdown(wait=False)

    def unused_names(self) -> tuple[str, ...]:
        """Source names that no receiver uses."""
        sets = [{m.recipe.sources[int(i)].name for i in m.recipe.unused} for m in self.members]
        return tuple(sorted(set.intersection(*sets))) if sets else ()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._progress(name, 0, 0)
        with self.recorder.span(name):
            yield

    def _enrol(self) -> list[Peer]:
        limits, hub = self._settings.deadlines, self._kept.switchboard.hub
        with self._phase("ready"):
            self._each(lambda i: i.control.wait_ready(limits.ready_s))
        with self._phase("enrol"):
            counts = self._each(lambda i: i.control.expected_receivers(limits.enrol_s))
            for instance, count in zip(self.instances, counts, strict=True):
                instance.num_receivers = count
                hub.admit(instance.token, count)
            tokens = {instance.token for instance in self.instances}
            try:
                self._each(lambda i: i.control.enrol(self._ticket(i), limits.enrol_s))
                peers = self._kept.switchboard.arrivals(
                    sum(counts), lambda p: p.hello.token in tokens, limits.enrol_s, "receivers", hint=_PARTIAL
                )
            except BaseException:
                self._kept.switchboard.give_up(tokens)
                raise
        for instance in self.instances:
            instance.peers = sorted(
                (p for p in peers if p.hello.token == instance.token), key=lambda peer: peer.key
            )
        self._refuse_busy(peers)
        served = [peer.receiver.served_version for peer in peers]
        self.version = next_version(served, self._settings.version, self._kept.holders.newest)
        return peers

    def _ticket(self, instance: Instance) -> Ticket:
        hub = self._kept.switchboard.hub
        return Ticket(self.id, hub.endpoint, hub.server_key, instance.token)

    def _refuse_busy(self, peers: Sequence[Peer]) -> None:
        busy = next((peer.receiver for peer in peers if peer.receiver.busy_with), None)
        if busy is None:
            return
        for peer in peers:
            peer.send(wire.Abort(reason=f"another update ({busy.busy_with}) is running"))
        if busy.busy_with == self.id:
            same = [
                instance.control.address
                for instance in self.instances
                if any(peer.receiver.worker == busy.worker for peer in instance.peers)
            ]
            text = f"{' and '.join(same)} are one engine, as worker {busy.worker} is in both; name each engine once"
            raise ConfigError(text, phase="enrol", name="to")
        text = f"worker {busy.worker} is taken by update {busy.busy_with}; wait for its end and try again"
        raise LocalProtocolError(text, phase="enrol", retryable=True)

    def _publish(self, peers: Sequence[Peer]) -> list[Manifest]:
        """Have the holders read; receivers describe themselves meanwhile where the holders' addresses are known."""
        devices = {peer.receiver.device_uuid or peer.key for peer in peers}
        count = self._num_holders or (len(devices) if self._settings.route == "broadcast" else 1)
        holders = self._kept.holders
        with self._phase("read"):
            holders.ensure(count)
            if holders.addresses:
                self._descriptions.ask(peers, holders.addresses)
            return holders.publish(self.version, self._settings.deadlines, self._progress)

    def _describe(self, peers: Sequence[Peer], holders: Sequence[HolderAddress]) -> None:
        with self._phase("describe"):
            needs = self._descriptions.collect(peers, holders)
        for instance in self.instances:
            instance.members = [Member(peer, needs[peer.key].recipe) for peer in instance.peers]
        self._needs = [needs[member.peer.key] for member in self.members]

    def _make_plan(self, manifests: Sequence[Manifest]) -> UpdatePlan:
        unused = self.unused_names()
        if self._settings.strict and unused:
            text = f"{len(unused)} source names are used by nothing (--strict): {', '.join(unused[:10])}"
            raise ManifestMismatchError(text, unused, phase="plan")
        with self._phase("plan"):
            plan = self._kept.planner.plan(manifests, self._needs, self._settings)
        for member, transfer in zip(self.members, plan.receivers, strict=True):
            member.plan = transfer
        self._check_rolling()
        for instance in self.instances:
            rings = {member.plan.ring.mode for member in instance.members if member.plan}
            instance.feeders = self._kept.holders.peers if rings & {"overlapped", "serial"} else ()
        return plan

    def _fill(self, plan: UpdatePlan, manifests: Sequence[Manifest]) -> None:
        """Have a trainer's ranks copy out what the plan reads, all of one step; other sources were read before."""
        holders = self._kept.holders
        if holders.is_stepped:
            with self._phase("read"):
                rows = planned_rows(plan, manifests)
                self.step = holders.fill(self.version, rows, self._settings.deadlines, self._progress)

    def _check_rolling(self) -> None:
        """Refuse to roll where engines would have to go round one ring together, all of them paused."""
        if not self._settings.rolling or len(self.instances) < 2:
            return
        plans = (member.plan for member in self.members if member.plan)
        if any(plan.route == "broadcast" and plan.ring.mode != "staged" for plan in plans):
            text = (
                "the broadcast goes round a ring for which all engines must pause together, not one after another; "
                "update without --rolling, by --route direct, or with a larger --budget-gib"
            )
            raise CapacityError(text, phase="plan")

    def _stage(self, plan: UpdatePlan, manifests: Sequence[Manifest]) -> None:
        holders, limits = tuple(manifest.holder for manifest in manifests), self._settings.deadlines
        rings: list[wire.RingAddress | None] = [None] * len(self.members)
        with self._phase("stage"):
            if plan.broadcast is not None:
                served_by = pair_with_holders([t.route == "broadcast" for t in plan.receivers], self._needs)
                placement = Placement.of(served_by, self._needs, len(holders))
                peers = self._kept.holders.peers
                self._broadcast = BroadcastRun(plan.broadcast, peers, self._kept.rings, placement)
                rings = self._broadcast.start(self.version, self._needs, holders, limits)
                for member in self.members:
                    member.plan = self._broadcast.noted(member.plan) if member.plan else None
            for member, transfer, ring in zip(self.members, plan.receivers, rings, strict=True):
                member.peer.send(
                    wire.Stage(
                        version=self.version,
                        plan=transfer,
                        holders=holders,
                        verify=self._settings.verify,
                        ring=ring,
                        deadline_s=limits.stage_s,
                    )
                )
            if self._settings.verify == "digest":
                self._ask_sums(plan)
            self._wait_staged()

    def _wait_staged(self) -> None:
        """Wait until all receivers have staged; where a broadcast ended because of a holder, that is the error."""
        limit_s, holders = self._settings.deadlines.stage_s, self._kept.holders.peers
        try:
            gather([member.peer for member in self.members], wire.Staged, limit_s, "stage", watch=holders)
        except HeadraceError as error:
            cause = self._broadcast.cancel() if self._broadcast is not None else None
            if cause is not None:
                raise cause from error
            raise

    def _ask_sums(self, plan: UpdatePlan) -> None:
        """Ask holders for the sums that each receiver must find; receivers with equal needs are asked for once."""
        holders, limit = self._kept.holders.peers, self._settings.deadlines.stage_s
        groups: dict[int, list[Member]] = {}
        for member, tables in zip(self.members, plan.digests, strict=True):
            groups.setdefault(id(tables), []).append(member)
        tables_of = {id(tables): tables for tables in plan.digests}
        for key, members in groups.items():
            size = _num_sums(members[0])
            for holder, table in tables_of[key].items():
                holders[holder].send(
                    wire.SumDigests(key=str(key), version=self.version, table=table, num_groups=size)
                )
        for key, members in groups.items():
            total = np.zeros(_num_sums(members[0]), np.uint64)
            for holder in tables_of[key]:
                total += holders[holder].expect(wire.Digests, limit, "digest").sums
            for member in members:
                member.expected = total

    def _commit(self) -> None:
        """Pause, commit and resume every instance, side by side or rolling; each stands still only for its own."""
        self._progress("commit", 0, 0)
        if self._settings.rolling:
            for instance in self.instances:
                self._commit_one(instance)
        else:
            limits = self._settings.deadlines
            self._each(self._commit_one, ending_s=limits.commit_s + 2 * limits.pause_s)
        if self._broadcast is not None:
            self._broadcast.finish(FINISH_S)

    def _commit_one(self, instance: Instance) -> None:
        # Workers that are held decide for themselves where the updater dies; a ticket could not even reach them.
        if instance.target and instance.barrier == "pause":
            self._kept.guardian.paused(instance.target)
        commit_instance(instance, self.version, self._settings, self.recorder)
        if instance.target:
            self._kept.guardian.resumed(instance.target)

    def _take_back(self, error: HeadraceError) -> None:
        """Have everyone forget the update, and resume what was paused and is whole."""
        if self._broadcast is not None:
            self._broadcast.cancel()
        error.engines = take_back(self.instances, error, self._settings.deadlines.pause_s)
        held = {instance.control.address for instance in self.instances if instance.call is not None}
        error.ended = [name for name, state in error.engines.items() if state == "mixed" and name in held]
        states = set(error.engines.values())
        if "mixed" in states:
            error.weights_state = "mixed"
        elif states == {"new"}:
            error.weights_state = "new"
        self._kept.holders.release(self.version)
        self._kept.holders.settle(SETTLE_S)
        self._kept.rings.broken()
        for instance in self.instances:
            if instance.target:
                self._kept.guardian.resumed(instance.target)

    def _each(self, call: Callable[[Instance], T], ending_s: float = 0.0) -> list[T]:
        """Run a blocking call for every instance side by side; raises the first failure after all have ended.

        Broken off by Ctrl-C, it waits at most `ending_s` for calls to end: none may talk with receivers, pause or
        resume beside what takes the update back. None begins before all are known here.
        """
        if len(self.instances) == 1:
            return [call(self.instances[0])]
        known, futures = threading.Event(), list[Future[T]]()

        def begin(instance: Instance) -> T:
            if not known.wait(BEGIN_S):
                instance.broken.set()
            instance.check()
            return call(instance)

        try:
            futures = [self._calls.submit(begin, instance) for instance in self.instances]
            known.set()
            # A signal that comes right before a wait is seen only after it.
            while wait(futures, SIGNALS_S).not_done:
                pass
        except BaseException:
            for instance in self.instances:
                instance.broken.set()
            known.set()
            wait(futures, ending_s)
            raise
        return [future.result() for future in futures]


def _num_sums(member: Member) -> int:
    return len(member.recipe.targets) + (len(member.plan.opaque) if member.plan else 0)
