"""Holders that die: while they are read, while they are mapped, between updates, and while their readers hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from faults_world import World, faulty_tcp, slow_tcp

from headrace.config import Deadlines
from headrace.errors import HeadraceError
from headrace.server.parameter_server import ParameterServer
from headrace.testing.faults import Fault

ROUTES = [{"transport": "tcp"}, {"route": "broadcast"}, {}]


@pytest.fixture
def in_background() -> Iterator[Callable[..., Future[Any]]]:
    """Run a call in a thread and wait for its end after the test."""
    with ThreadPoolExecutor(2) as pool:
        yield pool.submit


def holders_of(server: ParameterServer) -> list[int]:
    """Return the process ids of a server's holder processes."""
    return [process.pid for process in server._kept.holders._processes]


def kill(pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        os.kill(pid, number)


def test_a_holder_killed_while_it_is_read_fails_the_update_and_not_the_engine(
    world: World, in_background: Callable[..., Future[Any]]
) -> None:
    server = world.server(2)
    world.update(server, 2)
    world.engine.pauses = 0
    for rank in range(2):
        world.engine.call(rank, slow_tcp, 3.0)
    update = in_background(world.fails, server, transport="tcp")
    time.sleep(1.5)
    begin = time.monotonic()
    kill(holders_of(server))
    error = update.result(30)
    assert time.monotonic() - begin < 15
    assert "holder 0" in str(error)
    world.check()
    assert world.engine.pauses == 0
    world.update(server, 2)


@pytest.mark.parametrize("choices", ROUTES, ids=str)
def test_holders_killed_between_updates_are_started_again(world: World, choices: dict[str, str]) -> None:
    server = world.server(2, holders=2)
    for _ in range(2):
        world.update(server, 2, **choices)
        kill(holders_of(server)[1:])
        time.sleep(0.3)
    world.update(server, 2, **choices)


def test_a_holder_killed_in_the_pause_does_not_matter_where_its_memory_is_mapped(
    world: World, in_background: Callable[..., Future[Any]]
) -> None:
    """Mapped memory outlives its owner, so the commit ends well."""
    server = world.server(2)
    world.update(server, 2)
    world.arm(0, Fault(point="enter", action="delay", seconds=2.0))
    update = in_background(server.update, world.control, verify="full")
    time.sleep(1.2)
    kill(holders_of(server))
    report = update.result(30)
    world.seed, world.version = 2, report.version
    world.check()
    world.update(server, 2)


@pytest.mark.parametrize("choices", ROUTES[:2], ids=str)
def test_a_holder_killed_while_its_ring_goes_round_leaves_the_engine_paused_and_heals(
    world: World, in_background: Callable[..., Future[Any]], choices: dict[str, str]
) -> None:
    """With a ring smaller than the weights the pause needs the holder to its end."""
    server = world.server(2)
    world.update(server, 2)
    small: dict[str, Any] = {"budget_bytes": 20_000, "bucket_bytes": 4096, "verify": "none"}
    for rank in range(2):
        world.arm(rank, Fault(point="enter", action="delay", seconds=3.0))
    update = in_background(world.fails, server, **choices, **small)
    time.sleep(1.5)
    begin = time.monotonic()
    kill(holders_of(server))
    error = update.result(60)
    assert time.monotonic() - begin < 25
    assert isinstance(error, HeadraceError)
    if error.weights_state == "mixed":
        assert world.engine.paused
    else:
        world.check()
    for rank in range(2):
        world.arm(rank)
    world.update(server, 2, **choices)


def test_a_holder_that_hangs_is_given_up_at_the_deadline(
    world: World, in_background: Callable[..., Future[Any]]
) -> None:
    """SIGSTOP: no connection breaks. The next update of the same server starts another holder."""
    server = world.server(2)
    world.update(server, 2)
    world.engine.pauses = 0
    stopped = holders_of(server)
    kill(stopped, signal.SIGSTOP)
    begin = time.monotonic()
    error = world.fails(server, deadlines=Deadlines(read_s=2.0))
    assert time.monotonic() - begin < 30
    assert "holder 0" in str(error)
    world.check()
    assert world.engine.pauses == 0
    world.update(server, 2)
    assert not set(stopped) & set(holders_of(server))


@pytest.mark.parametrize("action", ["fail", "hang"])
def test_a_transport_that_breaks_while_staging(world: World, action: Any) -> None:
    """On one worker only; it is free again at once, also where the transport hangs."""
    server = world.trainer(2)
    world.engine.call(1, faulty_tcp, Fault(point="wait", action=action, call=2))
    begin = time.monotonic()
    error = world.fails(server, transport="tcp", bucket_bytes=4096, deadlines=Deadlines(stage_s=3.0))
    assert time.monotonic() - begin < 20
    assert "injected" in str(error) or "did not answer" in str(error)
    world.check()
    assert world.engine.pauses == 0
    world.engine.call(1, faulty_tcp)
    world.update(server, 2, transport="tcp")


def test_a_byte_that_a_transport_spoils_is_found(world: World) -> None:
    """Digests are the holder's own, so they tell what left it from what arrived."""
    world.engine.call(1, faulty_tcp, Fault(point="wait", action="corrupt", times=0))
    error = world.fails(world.trainer(2), transport="tcp", verify="digest")
    assert "differ from their source" in str(error)
    assert error.weights_state == "mixed"
    assert world.engine.paused
    world.engine.call(1, faulty_tcp)
    world.update(world.trainer(3), 3, transport="tcp")


def test_a_connection_that_breaks_while_the_ring_goes_round_is_the_error(world: World) -> None:
    """Not that the commit cannot be repeated, which the second attempt finds."""
    small = {"transport": "tcp", "budget_bytes": 30_000, "bucket_bytes": 4096}
    world.engine.call(1, faulty_tcp, Fault(point="wait", action="fail", call=12, times=0))
    error = world.fails(world.server(2), **small)
    assert error.weights_state == "mixed"
    assert "injected: tcp lost its holder in wait" in str(error)
    world.engine.call(1, faulty_tcp)
