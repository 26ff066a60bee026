"""Taking an update back: silent peers together cost no more than one, and what has come is read however late."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from headrace import wire
from headrace.control import Hub, PeerId
from headrace.errors import HeadraceError
from headrace.server import broadcast, commit
from headrace.server.broadcast import BroadcastRun, Placement, RingHost
from headrace.server.commit import Instance, take_back
from headrace.server.switchboard import Peer
from headrace.testing.local_engine import LocalEngine
from headrace.testing.recipe_backend import RecipeBackend
from headrace.testing.shapes import ModelShape, params_of, tp_recipe
from headrace.types import WorkerId

SHAPE = ModelShape(layers=1, hidden=16, vocab=64, heads=4, kv_heads=2, head_dim=4, intermediate=16)


class Ears:
    """A hub behind which nobody answers, but who is given words to say when something is sent to them."""

    def __init__(self) -> None:
        self.heard: list[float] = []
        self.answers: dict[PeerId, Callable[[], None]] = {}

    def send(self, peer: PeerId, _message: wire.Message) -> None:
        self.heard.append(time.monotonic())
        self.answers.get(peer, lambda: None)()


def peers_of(ears: Ears, count: int, instance: str = "") -> list[Peer]:
    """Return receivers of an instance, or holders."""
    hello: Callable[[int], wire.ReceiverHello | wire.HolderHello] = (
        (lambda i: wire.ReceiverHello("u", "t", WorkerId(instance, i), count, "cpu", "old", 0, None))
        if instance
        else (lambda i: wire.HolderHello("t", i, 1))
    )
    return [Peer(as_hub(ears), PeerId(f"{instance}{i}".encode()), hello(i)) for i in range(count)]


def as_hub(ears: Ears) -> Hub:
    return ears  # type: ignore[return-value]


def instance_of(ears: Ears, name: str, num_ranks: int) -> Instance:
    recipe = tp_recipe(params_of(SHAPE), 1, 0, kv_heads=2)
    control = LocalEngine([RecipeBackend(recipe, WorkerId(name, 0), 1)])
    control.paused = True
    return Instance(control, None, "t", peers=peers_of(ears, num_ranks, name), paused=True)


def test_silent_ranks_of_all_engines_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "ABORT_S", 1.0)
    ears = Ears()
    instances = [instance_of(ears, name, 3) for name in ("a", "b")]
    begin = time.monotonic()
    found = take_back(instances, HeadraceError("enough"), 1.0)
    assert time.monotonic() - begin < 2.0
    assert len(ears.heard) == 6
    assert max(ears.heard) - begin < 1.0, "all are told before any is waited for"
    assert list(found.values()) == ["old", "old"]
    assert not any(instance.paused for instance in instances)


def test_an_answer_that_came_while_another_rank_was_silent_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "ABORT_S", 0.2)
    ears = Ears()
    instance = instance_of(ears, "a", 2)
    late = instance.peers[1]

    def answer() -> None:
        late.deliver(wire.Staged())
        late.deliver(wire.Aborted(weights_state="mixed"))

    ears.answers[late.id] = answer
    assert list(take_back([instance], HeadraceError("enough"), 1.0).values()) == ["mixed"]
    assert instance.paused


def test_a_broadcast_that_never_began_is_cancelled_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "ABORT_S", 30.0)
    ears = Ears()
    rings = RingHost("127.0.0.1", "127.0.0.1")
    run = BroadcastRun(None, peers_of(ears, 4), rings, Placement((), ("",) * 4, ""))  # type: ignore[arg-type]
    begin = time.monotonic()
    assert run.cancel() is None
    assert time.monotonic() - begin < 10.0
    assert len(ears.heard) == 4
