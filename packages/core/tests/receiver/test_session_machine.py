"""One receiver against a dict: messages in any order, repeated, with failing commits and coordinators that vanish."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace import wire
from headrace.config import Deadlines, HostSettings, UpdateSettings
from headrace.control.hub import Hub
from headrace.control.keys import new_token
from headrace.errors import HeadraceError, LocalProtocolError
from headrace.planner import Planner, ReceiverNeeds
from headrace.protocols import Ticket
from headrace.receiver import Receiver
from headrace.recipe import LoadRecipe
from headrace.server.holders import HolderPool, SourceSpec
from headrace.server.switchboard import Peer, Switchboard
from headrace.store.tensors import TensorSource
from headrace.testing import shapes
from headrace.testing.faults import Fault, FaultyBackend
from headrace.testing.recipe_backend import RecipeBackend, write_recipe
from headrace.types import WorkerId

SHAPE = shapes.ModelShape(layers=1, hidden=16, vocab=70, heads=2, kv_heads=1, head_dim=8, intermediate=24)
PARAMS = shapes.params_of(SHAPE)
RECIPE = shapes.tp_recipe(PARAMS, 1, 0, kv_heads=1)
WAIT_S = 20.0
ALLOWED = {
    "enrolled": {wire.Describe, wire.Finish},
    "described": {wire.Stage},
    "staged": {wire.Prepare},
    "prepared": {wire.Commit},
    "committed": {wire.Commit, wire.Finish},
}


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {meta.name: torch.randn(meta.shape, generator=generator).to(torch.bfloat16) for meta in PARAMS}


def bytes_of(tensors: Any) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def live_of(version: int) -> dict[str, bytes]:
    """Return what live tensors hold after a version; zeros before the first."""
    live = {m.name: torch.zeros(m.shape, dtype=torch.bfloat16) for m in RECIPE.targets}
    if version:
        write_recipe(RECIPE, live, tensors_of(version).items())
    return bytes_of(live)


class Sessions(RuleBasedStateMachine):
    """The model: what is live, what is served, what state the conversation is in."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="hm-")
        self.host = HostSettings(socket_dir=Path(self.folder.name), permitted_uids=frozenset({os.getuid()}))
        self.backend = FaultyBackend(RecipeBackend(RECIPE, WorkerId("machine", 0), 1))
        self.receiver = Receiver(self.backend)
        self.tensors = tensors_of(1)
        self.recipes: dict[str, LoadRecipe] = {}
        self.open_board()
        self.live, self.served, self.pending, self.weights = 0, None, None, "old"
        self.peer: Peer | None = None
        self.state = ""
        self.version = 0
        self.staged_version = 0
        self.due: str | None = None

    def open_board(self) -> None:
        self.board = Switchboard(Hub(self.host))
        self.pool = HolderPool(SourceSpec(source=TensorSource(self.tensors)), self.board, self.host)
        self.manifests: list[Any] = []

    def close_board(self) -> None:
        self.pool.stop()
        self.board.hub.close(0.5)
        self.board.close()

    def teardown(self) -> None:
        self.receiver.close()
        self.close_board()
        self.folder.cleanup()

    # ---- conversations

    @initialize()
    def publish(self) -> None:
        """Make the next version's weights and have the holder read them."""
        self.version += 1
        for name, tensor in tensors_of(self.version).items():
            self.tensors[name].copy_(tensor)
        self.pool.ensure(1)
        self.manifests = self.pool.publish(self.version, Deadlines())

    @precondition(lambda self: self.peer is None)
    @rule()
    def enrol(self) -> None:
        self.publish()
        token = new_token()
        self.board.hub.admit(token, 1)
        ticket = Ticket(f"update-{self.version}", self.board.hub.endpoint, self.board.hub.server_key, token)
        self.receiver.enrol(ticket)
        (self.peer,) = self.board.arrivals(1, lambda p: p.hello.token == token, WAIT_S, "receivers")
        hello = self.peer.hello
        assert isinstance(hello, wire.ReceiverHello)
        assert hello.busy_with is None
        assert (hello.weights_state, hello.served_version) == (self.weights, self.served)
        assert hello.pending_version == self.pending
        self.state = "enrolled"

    @precondition(lambda self: self.peer is not None)
    @rule()
    def another_update_is_told_who_is_here(self) -> None:
        token = new_token()
        self.board.hub.admit(token, 1)
        self.receiver.enrol(Ticket("another", self.board.hub.endpoint, self.board.hub.server_key, token))
        (peer,) = self.board.arrivals(1, lambda p: p.hello.token == token, WAIT_S, "receivers")
        assert getattr(peer.hello, "busy_with", None) == f"update-{self.version}"
        peer.send(wire.Abort(reason="busy"))
        self.board.forget([peer])

    @precondition(lambda self: self.peer is not None)
    @rule()
    def lose_the_coordinator(self) -> None:
        """Whatever was not committed is forgotten, whatever was stays."""
        self.close_board()
        self.wait_free()
        self.open_board()
        self.end()

    def end(self) -> None:
        self.peer, self.state, self.due = None, "", None
        self.backend.arm()

    def wait_free(self) -> None:
        session = self.receiver._session
        assert session is not None
        with self.receiver.turn:
            assert not session.alive

    # ---- messages

    def say(self, message: wire.Message, kind: type[Any]) -> Any:
        """Send a message; return the answer where the state allows it, else check that it is refused."""
        assert self.peer is not None
        self.peer.send(message)
        if type(message) in ALLOWED[self.state]:
            return self.peer.expect(kind, WAIT_S, "test")
        with pytest.raises(LocalProtocolError) as caught:
            self.peer.expect(wire.Message, WAIT_S, "test")
        assert self.state in str(caught.value) or "has no place" in str(caught.value)
        assert caught.value.weights_state == self.weights
        return None

    @precondition(lambda self: self.peer is not None)
    @rule(with_metas=st.booleans())
    def describe(self, *, with_metas: bool) -> None:
        metas = self.pool_params() if with_metas else None
        holders = tuple(manifest.holder for manifest in self.manifests)
        answer = self.say(wire.Describe(PARAMS.key, metas, holders, tuple(self.recipes)), wire.Message)
        if isinstance(answer, wire.NeedMetas):
            assert metas is None
        elif answer is not None:
            assert isinstance(answer, wire.Described)
            self.recipe = self.recipes[answer.recipe_key] if answer.recipe is None else answer.recipe
            self.recipes[answer.recipe_key] = self.recipe
            assert answer.reachable == (holders[0].holder_id,)
            self.state = "described"

    def pool_params(self) -> Any:
        return self.manifests[0].params

    @precondition(lambda self: self.peer is not None)
    @rule(verify=st.sampled_from(["none", "digest", "full"]), transport=st.sampled_from(["memory", "tcp"]))
    def stage(self, verify: Any, transport: str) -> None:
        recipe = getattr(self, "recipe", RECIPE)
        need = ReceiverNeeds(
            worker=WorkerId("machine", 0), recipe=recipe, reachable=frozenset({0}), budget_bytes=1 << 30
        )
        choice = UpdateSettings(route="direct", transport=transport, verify=verify, bucket_bytes=4096)
        plan = Planner().plan(self.manifests, [need], choice).receivers[0]
        holders = tuple(manifest.holder for manifest in self.manifests)
        message = wire.Stage(self.version, plan, holders, verify, deadline_s=WAIT_S)
        if self.say(message, wire.Staged) is not None:
            self.state, self.verify = "staged", verify

    @precondition(lambda self: self.peer is not None)
    @rule()
    def prepare(self) -> None:
        if self.say(wire.Prepare(), wire.Prepared) is not None:
            self.state = "prepared"

    @precondition(lambda self: self.peer is not None)
    @rule(point=st.sampled_from(["enter", "leave"]))
    def let_the_next_commit_fail(self, point: str) -> None:
        self.due = point
        self.backend.arm(Fault(point=point, action="fail"))

    @precondition(lambda self: self.peer is not None)
    @rule()
    def commit(self) -> None:
        allowed = wire.Commit in ALLOWED[self.state]
        if allowed and self.due is not None:
            if self.due == "leave":
                self.weights = "mixed"
            assert self.peer is not None
            self.peer.send(wire.Commit(deadline_s=WAIT_S))
            with pytest.raises(HeadraceError, match="injected") as caught:
                self.peer.expect(wire.Committed, WAIT_S, "commit")
            assert caught.value.weights_state == self.weights
            self.due = None
        elif (answer := self.say(wire.Commit(deadline_s=WAIT_S), wire.Committed)) is not None:
            assert bool(len(answer.digests)) == (self.verify == "digest")
            self.state, self.weights = "committed", "new"
            self.live = self.pending = self.version

    @precondition(lambda self: self.peer is not None)
    @rule(right=st.booleans())
    def finish(self, *, right: bool) -> None:
        """Also right after the hello, as a guardian does; only the version that is in place can be confirmed."""
        version = self.pending if right and self.pending else self.version + 7
        fits = wire.Finish in ALLOWED[self.state] and version == self.pending
        assert self.peer is not None
        if wire.Finish in ALLOWED[self.state] and not fits:
            self.peer.send(wire.Finish(version=version))
            with pytest.raises(LocalProtocolError, match="not committed"):
                self.peer.expect(wire.Finished, WAIT_S, "finish")
        elif self.say(wire.Finish(version=version), wire.Finished) is not None:
            self.served, self.pending, self.weights = version, None, "old"
            assert self.backend.inner.version == version
            self.wait_free()
            self.end()

    @precondition(lambda self: self.peer is not None)
    @rule(spoiled=st.booleans())
    def abort(self, *, spoiled: bool) -> None:
        assert self.peer is not None
        self.peer.send(wire.Abort(reason="test", spoiled=spoiled))
        if spoiled and self.state == "committed":
            self.weights = "mixed"
        assert self.peer.expect(wire.Aborted, WAIT_S, "abort").weights_state == self.weights
        self.wait_free()
        self.end()

    @precondition(lambda self: self.peer is not None)
    @rule(message=st.sampled_from([wire.Publish(version=3, deadline_s=1.0), wire.Shutdown(), wire.Release(version=1)]))
    def foreign_messages_are_refused(self, message: wire.Message) -> None:
        self.say(message, wire.Message)

    # ---- what must be true at any time

    @invariant()
    def live_tensors_are_whole(self) -> None:
        assert self.receiver.weights_state == self.weights
        assert self.receiver.served_version == self.served
        if self.weights != "mixed":
            assert bytes_of(self.backend.live_tensors()) == live_of(self.live)

    @precondition(lambda self: self.peer is not None and self.state != "committed")
    @rule(steps=st.integers(1, 5))
    def go_on_as_a_coordinator_would(self, steps: int) -> None:
        """Take the next steps of a good update, so that random sequences reach its end."""
        for _ in range(steps):
            then: dict[str, Callable[[], None]] = {
                "enrolled": lambda: self.describe(with_metas=True),
                "described": lambda: self.stage("digest", "memory"),
                "staged": self.prepare,
                "prepared": self.commit,
                "committed": lambda: self.finish(right=True),
            }
            if self.peer is not None:
                then[self.state]()


TestSessions = pytest.mark.timeout(300)(Sessions.TestCase)
TestSessions.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
