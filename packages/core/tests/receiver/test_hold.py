"""The rules of a hold against a plain model of them: who goes on with what, and who ends."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.errors import ApplyError
from headrace.receiver.devices import WorkerDevice
from headrace.receiver.hold import Hold

VERSION = 7


class EndedError(Exception):
    """What stands for the end of the process."""


class UnendingHold(Hold):
    """A Hold whose process goes on after its end, so that the test can look at it."""

    ended = False

    def _end(self, why: str) -> Any:
        self.ended = True
        raise EndedError(why)


class Holds(RuleBasedStateMachine):
    """One rank's hold: the coordinator's words, its loss, and the weights in any state."""

    @initialize(world_size=st.sampled_from([1, 2, 8]))
    def begin(self, *, world_size: int) -> None:
        identity = SimpleNamespace(world_size=world_size)
        backend = SimpleNamespace(identity=lambda: identity)
        self.receiver: Any = SimpleNamespace(backend=backend, device=WorkerDevice("cpu"), weights_state="old")
        self.hold = UnendingHold(self.receiver, "update", self.adopt)
        self.alone = world_size == 1
        self.stood = self.voted = self.over = self.ended = False
        self.adopts = True
        self.version: int | None = None
        self.returned: list[int | None] = []
        self.thread: threading.Thread | None = None

    def teardown(self) -> None:
        if getattr(self, "thread", None) is not None:
            self.hold._over.set()
            self.thread.join(10)

    def adopt(self) -> int:
        if not self.adopts:
            raise RuntimeError("injected")
        self.receiver.weights_state = "old"
        return VERSION

    @precondition(lambda self: not self.stood)
    @rule()
    def stand(self) -> None:
        self.thread = threading.Thread(target=lambda: self.returned.append(self.hold.stand(60.0)), daemon=True)
        self.thread.start()
        if not self.over:
            self.hold.wait_stood(10.0, lambda: None)
        self.stood = True

    @precondition(lambda self: self.stood and not self.voted)
    @rule()
    def vote(self) -> None:
        if self.over:
            with pytest.raises(ApplyError, match="not held any more"):
                self.hold.vote()
        else:
            self.hold.vote()
            self.voted = True

    @precondition(lambda self: self.voted)
    @rule(state=st.sampled_from(["mixed", "new"]))
    def commit(self, *, state: str) -> None:
        if self.over:
            with pytest.raises(ApplyError, match="not held any more"), self.hold.standing():
                pass
        else:
            with self.hold.standing():
                self.receiver.weights_state = state

    @precondition(lambda self: self.voted and not self.over and self.receiver.weights_state == "new" and self.adopts)
    @rule()
    def finish(self) -> None:
        assert self.hold.finish(self.adopt()) > 0
        self.over, self.version = True, VERSION

    @precondition(lambda self: not self.ended)
    @rule()
    def forget_how_to_adopt(self) -> None:
        self.adopts = False

    @precondition(lambda self: not self.ended)
    @rule(how=st.sampled_from(["abort", "abandon", "expire"]))
    def let_go(self, *, how: str) -> None:
        state = self.receiver.weights_state
        ends = not self.over and not self.may_go_on(state, told=how == "abort")
        calls = {
            "abort": lambda: self.hold.abort("test"),
            "abandon": lambda: self.hold.abandon("test"),
            "expire": lambda: self.hold._expire(1.0),
        }
        if ends:
            with pytest.raises(EndedError):
                calls[how]()
            self.ended = True
            return
        answer = calls[how]()
        if how == "abort":
            assert answer == state
        if not self.over and self.voted and state == "new":
            self.version = VERSION
        self.over = True

    def may_go_on(self, state: str, *, told: bool) -> bool:
        """The rule: before the vote always; then on the old weights if told or alone, on new ones if alone."""
        if not self.voted:
            return True
        if state == "old":
            return told or self.alone
        return state == "new" and self.alone and self.adopts

    @invariant()
    def nobody_goes_on_unless_it_is_over(self) -> None:
        if not hasattr(self, "hold"):
            return
        assert self.hold.ended == self.ended
        if self.stood and self.over:
            assert self.thread is not None
            self.thread.join(10)
            assert self.returned == [self.version]
        elif self.stood:
            assert self.returned == []


TestHolds = pytest.mark.timeout(120)(Holds.TestCase)
TestHolds.settings = settings(max_examples=300, stateful_step_count=12, deadline=None, derandomize=True)


def test_a_deadline_ends_a_stand() -> None:
    identity = SimpleNamespace(world_size=2)
    backend = SimpleNamespace(identity=lambda: identity)
    receiver: Any = SimpleNamespace(backend=backend, device=WorkerDevice("cpu"), weights_state="old")
    hold = UnendingHold(receiver, "update", lambda: VERSION)
    assert hold.stand(0.05) is None
    with pytest.raises(ApplyError):
        hold.vote()
    assert hold.stand(60.0) is None
