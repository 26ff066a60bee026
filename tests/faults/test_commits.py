"""Commits that fail: retried where they can be, else the engine stays paused until a good update heals it."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from faults_world import MakeWorld, World, expected_sums, live_sums, make_tensors

from headrace.errors import ConnectError, HeadraceError, UpdateFailedError
from headrace.server.parameter_server import ParameterServer
from headrace.testing.bare_engine import BareControl, served_version, weights_state
from headrace.testing.faults import Fault
from headrace.types import CacheMode

ROUTES = [{"route": "direct"}, {"route": "direct", "transport": "tcp"}, {"route": "broadcast"}]
GAMMA = "model.norm.weight"


@pytest.mark.parametrize("choices", ROUTES, ids=str)
@pytest.mark.parametrize("point", ["enter", "leave"])
def test_a_commit_that_fails_once_is_repeated(world: World, choices: dict[str, str], point: str) -> None:
    world.arm(1, Fault(point=point, action="fail"))
    world.update(world.trainer(2), 2, **choices)
    assert world.engine.pauses == 1


@pytest.mark.parametrize("choices", ROUTES, ids=str)
def test_a_commit_that_cannot_be_made_leaves_the_engine_paused(
    world: World, choices: dict[str, str]
) -> None:
    """One rank has new bytes, the other may have some: nobody is answered by that until the next good update."""
    world.arm(1, Fault(point="leave", action="fail", times=0))
    server = world.trainer(2)
    for _ in range(2):
        error = world.fails(server, **choices)
        assert isinstance(error, UpdateFailedError)
        assert error.weights_state == "mixed"
        assert list(error.failures) == [(world.engine.instance, 1)]
        assert "injected failure in leave" in str(error)
        assert "InjectedError" in error.failures[world.engine.instance, 1].traceback
        assert world.engine.paused
        assert world.engine.call_all(weights_state) == ["new", "mixed"]
        assert world.engine.call_all(served_version) == [world.version] * 2
    world.arm(1)
    world.update(server, 2, **choices)


def test_a_commit_refused_before_the_first_byte_leaves_all_as_it_was(world: World) -> None:
    for rank in range(2):
        world.arm(rank, Fault(point="enter", action="fail", times=0))
    error = world.fails(world.trainer(2))
    assert isinstance(error, UpdateFailedError)
    assert error.weights_state == "old"
    assert len(error.failures) == 2
    world.check()


def test_a_failure_between_pause_and_commit_does_not_resume_mixed_weights(world: World) -> None:
    """After a broken commit, an update that is refused in the pause leaves the engine paused."""
    world.arm(0, Fault(point="leave", action="fail", times=0))
    assert world.fails(world.trainer(2)).weights_state == "mixed"
    world.arm(0)
    world.engine.call(1, forget_pointers)
    error = world.fails(world.trainer(3))
    assert "moved its parameters" in str(error)
    assert error.weights_state == "mixed"
    assert world.engine.paused
    world.engine.call(1, keep_pointers)


def forget_pointers(_backend: object, _receiver: object) -> None:
    """Let every live tensor seem to have moved when a commit is prepared."""
    from headrace.receiver.blocks import Destinations

    Destinations._pointers = Destinations.pointers
    Destinations.pointers = lambda self: [id(object())] + [time.time_ns() for _ in self.targets]


def keep_pointers(_backend: object, _receiver: object) -> None:
    from headrace.receiver.blocks import Destinations

    Destinations.pointers = Destinations._pointers


def test_a_spoiled_byte_is_written_again(world: World) -> None:
    world.arm(1, Fault(point="leave", action="corrupt", name=GAMMA))
    world.update(world.trainer(2), 2, verify="digest")
    assert world.engine.pauses == 1


def test_a_byte_that_stays_spoiled_is_an_integrity_error_with_its_name(world: World) -> None:
    world.arm(1, Fault(point="leave", action="corrupt", name=GAMMA, times=0))
    error = world.fails(world.trainer(2), verify="digest")
    assert isinstance(error, UpdateFailedError)
    assert error.weights_state == "mixed"
    failure = error.failures[world.engine.instance, 1]
    assert (failure.type_name, failure.name) == ("IntegrityError", GAMMA)
    assert GAMMA in str(error)
    assert world.engine.paused
    assert world.engine.call(1, weights_state) == "mixed"
    world.arm(1)


def test_without_verification_nobody_looks(world: World) -> None:
    """So that the tests above are about the verification and nothing else."""
    world.arm(1, Fault(point="leave", action="corrupt", name=GAMMA))
    report = world.trainer(2).update(world.control, verify="none")
    assert report.version > (world.version or 0)
    assert world.engine.call(1, live_sums) != expected_sums(2, world.layout, 2, 1)


def test_a_version_that_cannot_be_set_keeps_the_engine_paused(world: World) -> None:
    world.arm(1, Fault(point="set_version", action="fail", times=0))
    error = world.fails(world.trainer(2))
    assert "set_version" in str(error)
    assert world.engine.paused
    world.arm(1)


def test_a_commit_that_is_too_slow_is_an_error_and_heals(world: World) -> None:
    from headrace.config import Deadlines

    world.arm(1, Fault(point="enter", action="delay", seconds=4.0))
    error = world.fails(world.trainer(2), deadlines=Deadlines(commit_s=1.0))
    assert error.weights_state == "mixed"
    assert "did not answer within" in str(error)
    assert world.engine.paused


def test_a_failing_loader_on_the_first_update_is_repeated_or_reported(make_world: MakeWorld) -> None:
    """Dummy start: everything is opaque, the loader raises once, then for ever."""
    world = make_world(loaded_seed=None)
    world.arm(0, Fault(point="load", action="fail", times=0))
    error = world.fails(world.trainer(2))
    assert error.weights_state == "mixed"
    assert "loader refused" in str(error)
    world.arm(0, Fault(point="load", action="fail"))
    world.update(world.trainer(3), 3)


def test_of_two_engines_one_that_fails_does_not_hold_the_other_up(make_world: MakeWorld) -> None:
    """Each is whole or paused for itself; the next update brings both to one version."""
    good, bad = make_world(workers=1), make_world(workers=1)
    server = good.trainer(2)
    bad.arm(0, Fault(point="leave", action="fail", times=0))
    with pytest.raises(UpdateFailedError, match="injected") as caught:
        server.update([good.control, bad.control])
    assert caught.value.weights_state == "mixed"
    assert list(caught.value.failures) == [(bad.engine.instance, 0)]
    assert caught.value.engines == {good.control.address: "new", bad.control.address: "mixed"}
    good.seed, good.version = 2, caught.value.weight_version
    good.check()
    assert bad.engine.paused
    bad.arm(0)
    report = server.update([good.control, bad.control])
    for world in (good, bad):
        world.seed, world.version = 2, report.version
        world.check()


def test_of_two_engines_none_is_paused_where_one_refuses_the_source(make_world: MakeWorld) -> None:
    good, bad = make_world(workers=1), make_world(workers=1, loaded_seed=None)
    tensors = make_tensors(2)
    del tensors[GAMMA]
    with pytest.raises(UpdateFailedError, match=GAMMA):
        good.server(tensors=tensors).update([good.control, bad.control])
    good.check()
    assert (good.engine.pauses, bad.engine.pauses) == (0, 0)
    good.server(tensors=make_tensors(2)).update([good.control, bad.control])


class SlowFront(BareControl):
    """Its engine takes a while to stop."""

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        time.sleep(1.0)
        super().pause(cache, deadline_s)


class InterruptedFront(SlowFront):
    """The user presses Ctrl-C while its engine stops."""

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        super().pause(cache, deadline_s)


@pytest.mark.parametrize("fronts", [(SlowFront, InterruptedFront), (InterruptedFront, SlowFront)])
def test_ctrl_c_leaves_none_of_two_engines_paused(make_world: MakeWorld, fronts: tuple[type[BareControl], ...]) -> None:
    """They are stopped in threads of their own, which must have ended before the update is taken back.

    Where the first is interrupted, the threads are only just being started.
    """
    worlds = [make_world(workers=1), make_world(workers=1)]
    controls = [front(world.engine) for front, world in zip(fronts, worlds, strict=True)]
    with pytest.raises(KeyboardInterrupt):
        worlds[0].trainer(2).update(controls)
    time.sleep(1.5)
    assert worlds[fronts.index(InterruptedFront)].engine.pauses == 1
    for world in worlds:
        world.check()
        world.heals()


class LastFront(BareControl):
    """The parameter server is closed while its engine stands still."""

    server: ParameterServer

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        super().pause(cache, deadline_s)
        self.server.close()


@pytest.mark.parametrize("choices", ROUTES, ids=str)
def test_a_server_that_is_closed_in_the_pause_leaves_no_engine_paused(world: World, choices: dict[str, str]) -> None:
    """Nobody can be told any more to forget the update, and nobody has touched the weights."""
    control = LastFront(world.engine)
    control.server = world.trainer(2)
    with pytest.raises(HeadraceError):
        control.server.update(control, **choices)
    world.check()


class StubbornFront(BareControl):
    """Its engine cannot be resumed, and says so in words of its own."""

    def resume(self, deadline_s: float) -> None:
        message = f"{self.address} has no such call"
        raise AttributeError(message)


def test_an_engine_that_cannot_be_resumed_does_not_keep_the_next_one_paused(make_world: MakeWorld) -> None:
    stubborn, good = make_world(workers=1), make_world(workers=1)
    for world in (stubborn, good):
        world.arm(0, Fault(point="enter", action="fail", times=0))
    with pytest.raises(UpdateFailedError, match="injected failure in enter"):
        stubborn.trainer(2).update([StubbornFront(stubborn.engine), good.control])
    stubborn.check(paused=True)
    good.check()


class DeafFront(BareControl):
    """Its engine's front dies when it is told the version."""

    def confirm(self, version: int, deadline_s: float) -> None:
        message = f"{self.address} is gone"
        raise ConnectError(message, name=self.address)


def test_a_front_that_dies_after_the_commit_leaves_the_new_weights(world: World) -> None:
    """All ranks hold and report them: the error says so, and the engine runs."""
    server = world.trainer(2)
    with pytest.raises(ConnectError, match="is gone") as caught:
        server.update(DeafFront(world.engine))
    assert caught.value.weights_state == "new"
    world.seed, world.version = 2, caught.value.weight_version
    world.check()
