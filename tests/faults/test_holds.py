"""Commits inside one call to the workers: who is held goes on whole, or its process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from faults_world import MakeWorld, World, expected_sums, live_sums
from held_updater import EngineDoor

from headrace.config import Deadlines
from headrace.errors import ConfigError, HeadraceError, PlanError
from headrace.receiver.hold import EXIT_CODE
from headrace.server import commit
from headrace.testing.bare_engine import served_version, weights_state
from headrace.testing.faults import Fault
from headrace.testing.leaks import _is_alive, descendants

pytestmark = pytest.mark.timeout(120)
UPDATER = Path(__file__).with_name("held_updater.py")
KEEP = {"cache": "keep"}


def held_world(make_world: MakeWorld, workers: int, **layout: Any) -> World:
    world = make_world(workers=workers, **layout)
    world.holds = True
    return world


def exit_codes(world: World, ranks: list[int]) -> list[int | None]:
    """Return how workers ended; None for who runs on."""
    processes = [world.engine._processes[rank] for rank in ranks]
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


# ---- good ones


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "choices", [{}, {"transport": "tcp"}, {"route": "broadcast"}, {"verify": "full"}, {"verify": "none"}], ids=str
)
def test_a_hold_needs_no_pause(make_world: MakeWorld, workers: int, choices: dict[str, Any]) -> None:
    world = held_world(make_world, workers)
    for seed in (2, 3):
        report = world.update(world.trainer(seed), seed, **KEEP, **choices)
        (engine,) = report.engines
        assert (engine.barrier, engine.why) == ("hold", "caches are kept and all bytes are near")
        assert 0 < engine.stall_s < report.total_s
    assert (world.engine.holds, world.engine.pauses) == (2, 0)


def test_two_engines_are_held_side_by_side(make_world: MakeWorld) -> None:
    worlds = [held_world(make_world, workers) for workers in (1, 2)]
    report = worlds[0].trainer(2).update([world.control for world in worlds], cache="keep")
    for world in worlds:
        world.seed, world.version = 2, report.version
        world.check()
        assert (world.engine.holds, world.engine.pauses) == (1, 0)


def test_a_commit_that_fails_once_is_repeated_in_the_hold(make_world: MakeWorld) -> None:
    world = held_world(make_world, 2)
    world.arm(1, Fault(point="leave", action="fail"))
    world.update(world.trainer(2), 2, **KEEP)
    assert (world.engine.holds, world.engine.pauses) == (1, 0)


def test_a_hold_that_comes_too_late_is_none(make_world: MakeWorld) -> None:
    """A call for an update that is over, or for none that is known, returns at once."""
    world = held_world(make_world, 2)
    begin = time.monotonic()
    assert world.engine.hold("no such update", 30.0) == [None, None]
    assert time.monotonic() - begin < 5
    world.check()


# ---- where there is none


def test_what_is_no_case_for_a_hold(make_world: MakeWorld) -> None:
    """The report says why the engine was paused; where a hold was asked for, it says all and nothing is stopped."""
    world = held_world(make_world, 2, loaded_seed=None)
    server = world.trainer(2)
    with pytest.raises(PlanError, match=r"no.* confirmed version.*own loader") as caught:
        server.update(world.control, barrier="hold", **KEEP)
    assert caught.value.weights_state == "old"
    assert world.engine.pauses == 0
    first = world.update(server, 2, **KEEP)
    assert (first.engines[0].barrier, world.engine.pauses) == ("pause", 1)
    assert "confirmed version" in first.engines[0].why
    again = world.update(server, 2)
    assert (again.engines[0].barrier, again.engines[0].why) == ("pause", "caches are dropped, which takes a pause")
    chosen = world.update(server, 2, barrier="pause", **KEEP)
    assert (chosen.engines[0].barrier, chosen.engines[0].why) == ("pause", "asked for")
    small = world.update(server, 2, transport="tcp", budget_bytes=8192, bucket_bytes=4096, **KEEP)
    assert "not near before the commit" in small.engines[0].why
    world.holds = False
    plain = world.update(server, 2, **KEEP)
    assert plain.engines[0].why == "BareControl has no call that holds workers"
    assert world.engine.holds == 0


def test_a_hold_that_drops_caches_is_refused() -> None:
    from headrace.config import UpdateSettings

    with pytest.raises(ConfigError, match="give cache=keep"):
        UpdateSettings(barrier="hold")


# ---- updaters that die


def kill_at(world: World, place: str, folder: Path) -> None:
    """Start an update to seed 2 by another process and SIGKILL it where it stops; its holder leaves then."""
    with EngineDoor(world.control, folder) as door:
        command = [sys.executable, str(UPDATER), str(world.checkpoint(2)), door.path, place]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as updater:
            assert updater.stdout is not None
            assert updater.stdout.readline() == "here\n"
            left = descendants(updater.pid)
            updater.kill()
    limit = time.monotonic() + 60
    while any(map(_is_alive, left)):
        assert time.monotonic() < limit
        time.sleep(0.05)


def settled(world: World, seed: int, served: list[int]) -> None:
    """Wait until the only updater's session is over; then check what is live and served."""
    limit = time.monotonic() + 30
    while any(world.engine.call(rank, is_busy) for rank in range(world.workers)):
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert world.engine.call_all(served_version) == served
    world.seed, world.version = seed, served[0]
    world.check()
    world.heals(**KEEP)
    assert world.engine.pauses == 0


def is_busy(_backend: Any, receiver: Any) -> bool:
    return bool(receiver._session is not None and receiver._session.alive)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("place", ["unheld", "held"])
def test_killed_before_the_vote_the_old_weights_serve_on(
    make_world: MakeWorld, tmp_path: Path, workers: int, place: str
) -> None:
    world = held_world(make_world, workers)
    kill_at(world, place, tmp_path)
    settled(world, 1, [0] * workers)


@pytest.mark.parametrize(("place", "seed"), [("prepared", 1), ("committed", 2), ("half", 2), ("finished", 2)])
def test_killed_after_the_vote_a_single_rank_goes_on_whole(
    make_world: MakeWorld, tmp_path: Path, place: str, seed: int
) -> None:
    world = held_world(make_world, 1)
    kill_at(world, place, tmp_path)
    settled(world, seed, [seed - 1])


@pytest.mark.parametrize("place", ["prepared", "half", "committed"])
def test_killed_after_the_vote_ranks_that_may_differ_end(
    make_world: MakeWorld, tmp_path: Path, place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    world = held_world(make_world, 2)
    kill_at(world, place, tmp_path)
    assert exit_codes(world, [0, 1]) == [EXIT_CODE] * 2
    said = capfd.readouterr().err
    assert said.count("restart the engine") == 2
    assert "the updater is gone" in said


def test_killed_between_two_finishes_only_who_was_told_goes_on(make_world: MakeWorld, tmp_path: Path) -> None:
    """The engine cannot step without the other: nobody is answered by it."""
    world = held_world(make_world, 2)
    kill_at(world, "finished", tmp_path)
    assert exit_codes(world, [1]) == [EXIT_CODE]
    assert world.engine.call(0, served_version) == 1
    assert world.engine.call(0, live_sums) == expected_sums(2, world.layout, 2, 0)


# ---- updates that fail


def test_a_failure_before_the_vote_lets_all_go_on(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world = held_world(make_world, 2)
    monkeypatch.setattr(commit, "_commit_ranks", refuse)
    error = world.fails(world.trainer(2), **KEEP)
    assert error.weights_state == "old"
    world.check()
    monkeypatch.undo()
    world.heals(**KEEP)


def refuse(*_args: object) -> None:
    message = "injected before the commit"
    raise HeadraceError(message)


def test_a_commit_refused_before_the_first_byte_lets_all_go_on(make_world: MakeWorld) -> None:
    world = held_world(make_world, 2)
    for rank in range(2):
        world.arm(rank, Fault(point="enter", action="fail", times=0))
    assert world.fails(world.trainer(2), **KEEP).weights_state == "old"
    world.check()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_commit_that_cannot_be_made_ends_the_workers(
    make_world: MakeWorld, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    world = held_world(make_world, workers)
    world.arm(workers - 1, Fault(point="leave", action="fail", times=0))
    error = world.fails(world.trainer(2), **KEEP)
    assert error.weights_state == "mixed"
    assert "injected failure in leave" in str(error)
    assert "restart" in str(error)
    assert exit_codes(world, list(range(workers))) == [EXIT_CODE] * workers
    assert "restart the engine" in capfd.readouterr().err


def test_bytes_that_stay_wrong_end_the_workers(make_world: MakeWorld) -> None:
    """Both ranks hold a version whole, but one of them not the source's."""
    world = held_world(make_world, 2)
    world.arm(1, Fault(point="leave", action="corrupt", name="model.norm.weight", times=0))
    assert world.fails(world.trainer(2), **KEEP).weights_state == "mixed"
    assert exit_codes(world, [0, 1]) == [EXIT_CODE] * 2


def test_a_version_that_cannot_be_set_ends_the_worker(make_world: MakeWorld) -> None:
    world = held_world(make_world, 2)
    world.arm(1, Fault(point="set_version", action="fail", times=0))
    error = world.fails(world.trainer(2), **KEEP)
    assert "set_version" in str(error)
    assert exit_codes(world, [1]) == [EXIT_CODE]


def test_a_worker_killed_in_the_hold_ends_the_other(make_world: MakeWorld) -> None:
    world = held_world(make_world, 2)
    world.arm(1, Fault(point="enter", action="delay", seconds=3.0))
    server = world.trainer(2)

    def kill(phase: str, _done: int, _total: int) -> None:
        if phase == "commit":
            threading.Timer(1.0, world.engine.kill, [1]).start()

    with pytest.raises(HeadraceError) as caught:
        server.update(world.control, progress=kill, **KEEP)
    assert caught.value.weights_state == "mixed"
    assert exit_codes(world, [0]) == [EXIT_CODE]


# ---- deadlines


@pytest.mark.parametrize("workers", [1, 2])
def test_a_hold_past_its_deadline(make_world: MakeWorld, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between vote and commit the updater sleeps: a single rank goes on with what it has, several end."""
    world = held_world(make_world, workers)
    monkeypatch.setattr(commit, "_hold_s", lambda _limits: 1.0)
    plain = commit._commit_ranks

    def late(instance: Any, deadline_s: float) -> None:
        time.sleep(3)
        plain(instance, deadline_s)

    monkeypatch.setattr(commit, "_commit_ranks", late)
    error = world.fails(world.trainer(2), **KEEP)
    if workers == 2:
        assert error.weights_state == "mixed"
        assert exit_codes(world, [0, 1]) == [EXIT_CODE] * 2
        return
    assert error.weights_state == "old"
    assert "not held any more" in str(error)
    world.check()


def test_a_commit_that_hangs_past_the_deadline_ends_its_worker(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = held_world(make_world, 1)
    monkeypatch.setattr(commit, "_hold_s", lambda _limits: 1.0)
    world.arm(0, Fault(point="leave", action="delay", seconds=20.0))
    error = world.fails(world.trainer(2), deadlines=Deadlines(commit_s=30), **KEEP)
    assert error.weights_state == "mixed"
    assert exit_codes(world, [0]) == [EXIT_CODE]


def test_workers_that_never_stand_fail_the_update_and_nothing_else(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = held_world(make_world, 2)
    monkeypatch.setattr(type(world.control), "hold", lambda *_args: time.sleep(3))
    error = world.fails(world.trainer(2), deadlines=Deadlines(pause_s=1), **KEEP)
    assert (error.weights_state, error.phase) == ("old", "prepare")
    monkeypatch.setattr(type(world.control), "hold", lambda *_args: None)
    begin = time.monotonic()
    error = world.fails(world.trainer(2), **KEEP)
    assert "went on before its workers were asked" in str(error)
    assert time.monotonic() - begin < 20
    world.check()
    assert world.engine.call_all(weights_state) == ["old"] * 2
