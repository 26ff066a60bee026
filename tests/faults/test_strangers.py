"""Others at the same doors: a second update, peers of another version, garbage on every socket."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from faults_world import MakeWorld, World, slow_tcp

from headrace import wire
from headrace.config import Deadlines
from headrace.control.dialer import Dialer
from headrace.errors import (
    ConfigError,
    ConnectError,
    HeadraceError,
    LocalProtocolError,
    TransferTimeoutError,
    VersionSkewError,
)
from headrace.protocols import Ticket
from headrace.server.parameter_server import ParameterServer
from headrace.testing.bare_engine import BareControl
from headrace.types import WorkerId
from headrace.wire import encoding

SLOW_S = 3.0


@pytest.fixture
def in_background() -> Any:
    """Run a call in a thread and wait for its end after the test."""
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


def staging(world: World, server: ParameterServer, in_background: Callable[..., Future[Any]]) -> Future[Any]:
    """Begin an update whose staging takes a while, and return when it is at it."""
    for rank in range(world.workers):
        world.engine.call(rank, slow_tcp, SLOW_S)
    reached = threading.Event()

    def progress(phase: str, _done: int, _total: int) -> None:
        if phase == "stage":
            reached.set()

    future = in_background(server.update, world.control, transport="tcp", progress=progress)
    assert reached.wait(30)
    time.sleep(0.5)
    return future


def finish(world: World, future: Future[Any], seed: int) -> None:
    """Check that an update in the background brings its weights."""
    report = future.result(60)
    world.seed, world.version = seed, report.version
    world.check()


def test_of_two_updates_one_wins(world: World, in_background: Callable[..., Future[Any]]) -> None:
    first = staging(world, world.trainer(2), in_background)
    error = world.fails(world.trainer(3))
    assert isinstance(error, LocalProtocolError)
    assert error.retryable
    finish(world, first, 2)
    assert f"update {first.result().update_id}" in str(error)
    world.update(world.trainer(3), 3)


def test_updates_that_begin_together_do_not_lock_each_other_out(
    world: World, in_background: Callable[..., Future[Any]]
) -> None:
    servers = [world.trainer(seed) for seed in (2, 3, 4)]
    barrier = threading.Barrier(len(servers))

    def race(server: ParameterServer) -> Any:
        barrier.wait(10)
        try:
            return server.update(world.control)
        except HeadraceError as error:
            return error

    results = [future.result(60) for future in [in_background(race, server) for server in servers]]
    losers = [error for error in results if isinstance(error, HeadraceError)]
    assert all(error.retryable for error in losers)
    winners = [
        (r.version, seed) for r, seed in zip(results, (2, 3, 4), strict=True) if not isinstance(r, HeadraceError)
    ]
    assert winners
    world.version, world.seed = max(winners)
    world.check()


def test_a_server_makes_one_update_at_a_time(
    world: World, in_background: Callable[..., Future[Any]]
) -> None:
    server = world.trainer(2)
    first = staging(world, server, in_background)
    error = world.fails(server)
    assert "already" in str(error)
    assert error.retryable
    finish(world, first, 2)


def speak_version(_backend: object, _receiver: object, version: int) -> None:
    """Let a worker's messages carry another protocol version."""
    encoding._HEADER_BYTES = encoding._HEADER.pack(encoding._MAGIC, version)  # type: ignore[misc]


def test_a_peer_of_another_protocol_version_is_named(world: World) -> None:
    """In the error of the update; the other workers are free for the next one."""
    world.engine.call(1, speak_version, wire.PROTOCOL_VERSION + 1)
    server = world.trainer(2)
    error = world.fails(server, deadlines=Deadlines(enrol_s=3.0))
    assert isinstance(error, VersionSkewError)
    assert f"protocol {wire.PROTOCOL_VERSION + 1}" in str(error)
    assert "worker 0" in str(error)
    world.check()
    assert world.engine.pauses == 0
    world.engine.call(1, speak_version, wire.PROTOCOL_VERSION)
    world.update(server, 2)


def test_garbage_on_every_socket_disturbs_nothing(
    world: World, in_background: Callable[..., Future[Any]], socket_dir: Path
) -> None:
    server = world.trainer(2)
    update = staging(world, server, in_background)
    noise = random.Random(5).randbytes
    hub = server._kept.switchboard.hub
    host, port = hub.endpoint.removeprefix("tcp://").split(":")
    (lender,) = socket_dir.glob("holder-*/socket")
    data_ports = [int(p) for p in _listening_ports() if p != int(port)]
    for _ in range(3):
        for data_port in (int(port), *data_ports):
            with socket.create_connection((host, data_port), 5) as stranger:
                stranger.sendall(noise(3000))
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(lender))
            stranger.sendall(noise(3000))
    _plain_dealer(hub.endpoint, noise)
    _unknown_token(hub.endpoint, hub.server_key)
    finish(world, update, 2)
    world.update(server, 2)
    world.update(server, 2, transport="tcp")


def _listening_ports() -> list[int]:
    """Return the TCP ports that this process listens on."""
    inodes = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes]


def _plain_dealer(endpoint: str, noise: Callable[[int], bytes]) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(endpoint)
        dealer.send_multipart([noise(6), noise(100)])
        time.sleep(0.2)


def _unknown_token(endpoint: str, server_key: str) -> None:
    hello = wire.ReceiverHello("update", "not a token", WorkerId("stranger", 0), 1, "cpu", "old", 0, None)
    with Dialer(endpoint, server_key) as dialer:
        dialer.send(hello)
        with pytest.raises(HeadraceError, match="token"):
            dialer.receive(10)


@pytest.mark.parametrize(
    ("target", "kind", "text"),
    [
        ("torch=http://127.0.0.1:1", ConnectError, "127.0.0.1:1"),
        ("torch=http://no-such-host.invalid:80", ConnectError, "no-such-host"),
        ("http://127.0.0.1:1", ConfigError, "ENGINE=URL"),
        ("troch=http://127.0.0.1:1", HeadraceError, "troch"),
    ],
)
def test_a_wrong_address_is_said_in_time(world: World, target: str, kind: type, text: str) -> None:
    """Also where another engine of the same update is there: it is not paused."""
    server = world.trainer(2)
    begin = time.monotonic()
    with pytest.raises(kind, match=text):
        server.update([target, world.control], deadlines=Deadlines(ready_s=1.0))
    assert time.monotonic() - begin < 20
    world.check()
    assert world.engine.pauses == 0


class DoorlessControl(BareControl):
    """Of an engine that cannot be enrolled, as one without our plug-in."""

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:
        time.sleep(1.0)  # others have dialled in
        raise ConnectError("there is no such door")


def test_an_engine_that_cannot_be_enrolled_leaves_the_others_free(world: World) -> None:
    """For any updater, while the one that failed lives on."""
    server = world.trainer(2)
    with pytest.raises(ConnectError, match="no such door"):
        server.update([world.control, DoorlessControl(world.engine)])
    world.update(world.trainer(3), 3)
    world.update(server, 2)


class PartialFront(BareControl):
    """Of data-parallel engines behind several fronts: it counts all workers, and its tickets reach only its own."""

    def expected_receivers(self, deadline_s: float) -> int:
        return 2 * super().expected_receivers(deadline_s)


def test_a_front_that_reaches_only_some_workers_is_named_as_a_cause(world: World) -> None:
    server = world.trainer(2)
    with pytest.raises(TransferTimeoutError, match=r"came: .*external or hybrid load balancing"):
        server.update(PartialFront(world.engine), deadlines=Deadlines(enrol_s=2))
    world.update(server, 2)


def test_an_unusable_ticket_does_not_occupy_a_worker(make_world: MakeWorld) -> None:
    """One that makes no sense is dropped at once, one to nobody after the time that a connection may take."""
    world = make_world(workers=1)
    world.engine.enrol(Ticket("update", "nonsense", "no key", "token"))
    time.sleep(0.5)
    world.update(world.trainer(2), 2)
    world.engine.enrol(Ticket("update", "tcp://127.0.0.1:1", "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7", "t"))
    time.sleep(0.5)
    error = world.fails(world.trainer(3))
    assert "taken by update" in str(error)
    time.sleep(11)
    world.update(world.trainer(2), 2)
