"""One engine instance stands still: stop or hold, vote, commit, check, confirm, go on - and the way back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from headrace import wire
from headrace.config import Deadlines, EngineTarget, UpdateSettings
from headrace.errors import (
    FailureKey,
    HeadraceError,
    IntegrityError,
    LocalProtocolError,
    UpdateFailedError,
    WeightsState,
)
from headrace.plan import TransferPlan
from headrace.protocols import EngineControl
from headrace.recipe import LoadRecipe
from headrace.server.holding import HoldCall
from headrace.server.switchboard import Peer, ask_all, failed, tell
from headrace.telemetry import Recorder
from headrace.types import U64

logger = logging.getLogger(__name__)
ABORT_S = 5.0
COMMIT_ATTEMPTS = 2


@dataclass
class Member:
    """One receiver of the update and what was planned for it.

    Attributes:
        peer: The conversation with it.
        recipe: What it needs.
        plan: What it does.
        expected: Sums that its live tensors must have; None where nothing is compared.
    """

    peer: Peer
    recipe: LoadRecipe
    plan: TransferPlan | None = None
    expected: U64 | None = None


@dataclass
class Instance:
    """One engine address and how far its update got.

    Attributes:
        control: How the updater talks to the engine.
        target: How a guardian reaches the engine; None for a control object of the caller.
        token: What its receivers present; tells them from those of other instances.
        update_id: The update, as its receivers know it.
        num_receivers: How many must dial in.
        peers: Receivers that have.
        members: Receivers that have said what they need, by rank.
        feeders: Holders without which the commit cannot end.
        barrier: What keeps forward steps out of its commit.
        barrier_why: Why that, one sentence.
        call: The call that holds its workers, if there is one.
        paused: Whether it was paused and not resumed.
        writing: Whether a commit was ordered.
        spoiled: Whether committed bytes were found wrong.
        done: Whether all its ranks hold and report the new version.
        stall_s: Seconds from pause to resume; held, from the first rank that stood to the hold's return.
        broken: Set to have its commit end as soon as it can, for the update to be taken back.
    """

    control: EngineControl
    target: EngineTarget | None
    token: str
    update_id: str = ""
    num_receivers: int = 0
    peers: list[Peer] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    feeders: Sequence[Peer] = ()
    barrier: Literal["pause", "hold"] = "pause"
    barrier_why: str = ""
    call: HoldCall | None = None
    paused: bool = False
    writing: bool = False
    spoiled: bool = False
    done: bool = False
    stall_s: float = 0.0
    broken: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Do nothing while the update goes on.

        Raises:
            LocalProtocolError: It was broken off.
        """
        if self.broken.is_set():
            raise LocalProtocolError("the update was broken off", phase="commit")


def commit_instance(instance: Instance, version: int, settings: UpdateSettings, recorder: Recorder) -> None:
    """Bring one engine to `version` while it stands still; it has gone on when this returns. Blocking.

    Raises:
        UpdateFailedError: A rank failed; `weights_state` says what the instance holds. It is still paused, or held.
    """
    commit = _commit_held if instance.barrier == "hold" else _commit_paused
    commit(instance, version, settings, recorder)


def _commit_paused(instance: Instance, version: int, settings: UpdateSettings, recorder: Recorder) -> None:
    limits, begin = settings.deadlines, time.monotonic()
    with recorder.span("stall"):
        with recorder.span("pause"):
            instance.check()
            instance.paused = True
            instance.control.pause(settings.cache, limits.pause_s)
        with recorder.span("prepare"):
            ask_all(instance.peers, wire.Prepare(), wire.Prepared, limits.pause_s, "prepare", instance.check)
        with recorder.span("commit"):
            _commit_ranks(instance, limits.commit_s)
        with recorder.span("finish"):
            ask_all(instance.peers, wire.Finish(version=version), wire.Finished, limits.commit_s, "finish")
            instance.done = True
            instance.control.confirm(version, limits.pause_s)
        with recorder.span("resume"):
            instance.control.resume(limits.pause_s)
            instance.paused = False
    instance.stall_s = time.monotonic() - begin


def _commit_held(instance: Instance, version: int, settings: UpdateSettings, recorder: Recorder) -> None:
    """Commit inside one call to all workers, which stand still between two forward steps until `Finish`.

    Tokens flow while the call waits for its turn, so the stall is what the rank that stood longest says, and the time
    from then to the call's return.
    """
    limits = settings.deadlines

    def check() -> None:
        instance.check()
        call.check()

    with recorder.span("hold"):
        call = instance.call = HoldCall(instance.control, instance.update_id, _hold_s(limits))
        with recorder.span("prepare"):
            ask = wire.Prepare(hold_s=limits.pause_s)
            ask_all(instance.peers, ask, wire.Prepared, limits.pause_s, "prepare", check)
        with recorder.span("commit"):
            _commit_ranks(instance, limits.commit_s)
        with recorder.span("finish"):
            order = wire.Finish(version=version)
            answers = ask_all(instance.peers, order, wire.Finished, limits.commit_s, "finish")
            instance.done, finished = True, time.monotonic()
            call.wait(limits.pause_s)
            instance.stall_s = max(answer.held_s for answer in answers.values()) + time.monotonic() - finished
            instance.control.confirm(version, limits.pause_s)


def _hold_s(limits: Deadlines) -> float:
    """Return how long a hold may last: longer than all that is done in it, so that its end is always ours to say."""
    return 2 * limits.pause_s + (COMMIT_ATTEMPTS + 1) * limits.commit_s


def _commit_ranks(instance: Instance, deadline_s: float) -> None:
    """Commit on all ranks; copies are absolute, so what failed or differs on a live rank is written again.

    Broken off, it ends at once. Once all ranks have committed, nothing is broken off: the way on is the shorter.
    """
    instance.check()
    instance.writing = True
    todo, causes = instance.members, dict[FailureKey, HeadraceError]()
    for attempt in range(1, COMMIT_ATTEMPTS + 1):
        for member in todo:
            member.peer.send(wire.Commit(deadline_s=deadline_s))
        errors = _gather_commits(todo, deadline_s, instance)
        if not errors:
            return
        causes = _causes(errors, causes)
        lost = any(peer.lost for peer in (*instance.peers, *instance.feeders))
        if attempt == COMMIT_ATTEMPTS or lost or instance.broken.is_set():
            found = (*errors.values(), *causes.values())
            instance.spoiled = any(isinstance(error, IntegrityError) for error in found)
            raise _broken(causes, instance)
        logger.warning("commit attempt %d failed, writing again: %s", attempt, next(iter(errors.values())))
        todo = [member for member in todo if member.peer.key in errors]


def _gather_commits(
    members: Sequence[Member], deadline_s: float, instance: Instance
) -> dict[FailureKey, HeadraceError]:
    errors: dict[FailureKey, HeadraceError] = {}
    limit = time.monotonic() + deadline_s
    for member in members:
        try:
            left = limit - time.monotonic()
            answer = member.peer.expect(wire.Committed, left, "commit", instance.feeders, instance.check)
            _check_sums(member, answer.digests)
        except HeadraceError as error:
            errors[member.peer.key] = error
    return errors


def _check_sums(member: Member, found: np.ndarray) -> None:
    """Compare what a receiver's live tensors hold with what the holders sent.

    Raises:
        IntegrityError: Names the first parameters that differ.
    """
    if member.expected is None:
        return
    wrong = np.flatnonzero(found != member.expected)
    if len(wrong):
        names = [_group_name(int(group), member) for group in wrong[:5]]
        text = f"{len(wrong)} parameters differ from their source: {', '.join(names)}"
        raise IntegrityError(text, name=names[0], phase="verify", weights_state="mixed")


def _group_name(group: int, member: Member) -> str:
    """Return the parameter behind a digest: a live tensor, or a source that went through the loader."""
    targets = member.recipe.targets
    if group < len(targets) or member.plan is None:
        return str(targets[group].name)
    return str(member.recipe.sources[int(member.plan.opaque[group - len(targets)])].name)


def _causes(
    errors: dict[FailureKey, HeadraceError], before: dict[FailureKey, HeadraceError]
) -> dict[FailureKey, HeadraceError]:
    """Return why each rank fails: what it said first, as later failures may only follow from that one."""
    causes = {key: before.get(key, error) for key, error in errors.items()}
    for key, error in errors.items():
        if error.weights_state == "mixed":
            causes[key].weights_state = "mixed"
    return causes


def _broken(errors: dict[FailureKey, HeadraceError], instance: Instance) -> UpdateFailedError:
    error = failed(errors, "commit")
    if len(errors) < len(instance.members) and error.weights_state == "old":
        error.weights_state = "mixed"
    return error


def take_back(
    instances: Sequence[Instance], reason: HeadraceError, resume_s: float
) -> dict[str, WeightsState]:
    """Have all receivers forget the update, and resume every instance whose weights are whole.

    All are told before any is waited for, so that the silent ones together cost no more than one.

    Returns:
        What each instance holds now, by its address.
    """
    for instance in instances:
        if not instance.done:
            tell(instance.peers, wire.Abort(reason=str(reason), spoiled=instance.spoiled))
    limit = time.monotonic() + ABORT_S
    return {instance.control.address: _taken_back(instance, limit, resume_s) for instance in instances}


def _taken_back(instance: Instance, limit: float, resume_s: float) -> WeightsState:
    """Resume an instance if its weights are whole; returns what it holds.

    Whole are those that no rank has touched, in this update or in one that broke off before it, and those of an
    instance that only could not be resumed. Workers that are held go on if theirs are; where they are not, the process
    of at least one has ended, and with it the engine.
    """
    if instance.done:
        _resume(instance, resume_s)
        return "new"
    answers = [peer.drain(wire.Aborted, limit) for peer in instance.peers]
    states = {answer.weights_state if answer else "lost" for answer in answers}
    if instance.call is not None and states == {"new"} and len(instance.peers) == 1:
        return "new"
    whole = states <= ({"old"} if instance.writing else {"old", "lost"})
    if not whole:
        return "mixed"
    _resume(instance, resume_s)
    return "old"


def _resume(instance: Instance, resume_s: float) -> None:
    """Resume an instance if it was paused; one that cannot be does not keep others from it."""
    if not instance.paused:
        return
    try:
        instance.control.resume(resume_s)
        instance.paused = False
    except Exception as error:  # noqa: BLE001 - a control may be the caller's own
        logger.warning("%s could not be resumed: %s", instance.control.address, error)
