"""Hub and Dialer: what passes, who is admitted, how loss is told."""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from headrace.config import HostSettings
from headrace.control import Dialer, Hub, KeyPair, Lost, PeerId, Received, new_token
from headrace.errors import (
    ConfigError,
    ConnectError,
    HeadraceError,
    PeerLostError,
    RemoteProtocolError,
    TransferTimeoutError,
    TransportClosedError,
    VersionSkewError,
)
from headrace.testing.leaks import left_over, snapshot
from headrace.types import WorkerId
from headrace.wire import (
    Abort,
    Committed,
    HolderHello,
    Prepare,
    Prepared,
    Progress,
    ReceiverHello,
    Refused,
    Staged,
    decode,
    encode,
)

HOST = HostSettings(socket_dir=Path("/nonexistent"), permitted_uids=frozenset())
PEER_SCRIPT = Path(__file__).with_name("peer_process.py")

Dial = Callable[[], Dialer]
RawDial = Callable[[], zmq.Socket[bytes]]
Spawn = Callable[[str], subprocess.Popen[bytes]]

pytestmark = pytest.mark.timeout(60)


def hello(token: str, rank: int = 0) -> ReceiverHello:
    return ReceiverHello("u1", token, WorkerId("a", rank), 8, "cpu", "old", 3, None)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(HOST) as made:
        yield made


@pytest.fixture
def token(hub: Hub) -> str:
    made = new_token()
    hub.admit(made, uses=100)
    return made


@pytest.fixture
def dial(hub: Hub) -> Iterator[Dial]:
    made: list[Dialer] = []

    def make() -> Dialer:
        made.append(Dialer(hub.endpoint, hub.server_key))
        return made[-1]

    yield make
    for dialer in made:
        dialer.close()


@pytest.fixture
def raw(hub: Hub) -> Iterator[RawDial]:
    """Sockets that speak CURVE but not our protocol."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made: list[zmq.Socket[bytes]] = []

    def make() -> zmq.Socket[bytes]:
        keys = KeyPair.new()
        dealer = context.socket(zmq.DEALER)
        made.append(dealer)
        dealer.curve_publickey, dealer.curve_secretkey = keys.public.encode(), keys.secret.encode()
        dealer.curve_serverkey = hub.server_key.encode()
        dealer.connect(hub.endpoint)
        return dealer

    yield make
    context.destroy(linger=0)


@pytest.fixture
def spawn(hub: Hub, token: str) -> Iterator[Spawn]:
    made: list[subprocess.Popen[bytes]] = []

    def make(mode: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(PEER_SCRIPT), mode, hub.endpoint, hub.server_key, token]
        made.append(subprocess.Popen(command))
        return made[-1]

    yield make
    for process in made:
        process.kill()
        process.wait()


def enter(hub: Hub, dialer: Dialer, token: str, rank: int = 0) -> PeerId:
    dialer.send(hello(token, rank))
    event = hub.receive(5)
    assert isinstance(event, Received)
    return event.peer


def assert_hub_lives(hub: Hub, dialer: Dialer, token: str) -> None:
    peer = enter(hub, dialer, token)
    hub.send(peer, Prepare())
    assert dialer.receive(5) == Prepare()


# ---- what passes


def test_messages_pass_in_order_both_ways(hub: Hub, token: str, dial: Dial) -> None:
    dialer = dial()
    dialer.send(hello(token, rank=3))
    for step in range(50):
        dialer.send(Progress(step, 50))
    events = [hub.receive(5) for _ in range(51)]
    assert events[0] == Received(events[0].peer, hello(token, rank=3))
    assert str(events[0].peer) == "receiver a[3]"
    assert [e.message for e in events[1:]] == [Progress(step, 50) for step in range(50)]  # type: ignore[union-attr]
    for step in range(50):
        hub.send(events[0].peer, Abort(str(step)))
    assert [dialer.receive(5) for _ in range(50)] == [Abort(str(step)) for step in range(50)]


def test_large_arrays_arrive_byte_for_byte(hub: Hub, token: str, dial: Dial) -> None:
    digests = np.random.default_rng(5).integers(0, 2**63, 2_000_000).astype(np.uint64)
    dialer = dial()
    peer = enter(hub, dialer, token)
    dialer.send(Committed(digests))
    event = hub.receive(10)
    assert isinstance(event, Received)
    assert event.peer == peer
    assert isinstance(event.message, Committed)
    assert event.message.digests.tobytes() == digests.tobytes()


def test_many_peers_keep_apart(hub: Hub, token: str, dial: Dial) -> None:
    dialers = [dial() for _ in range(8)]
    peers = [enter(hub, dialer, token, rank) for rank, dialer in enumerate(dialers)]
    assert len(set(peers)) == 8
    for rank, peer in enumerate(peers):
        hub.send(peer, Abort(str(rank)))
    assert [dialer.receive(5) for dialer in dialers] == [Abort(str(rank)) for rank in range(8)]


def test_sending_from_many_threads_loses_nothing(hub: Hub, token: str, dial: Dial) -> None:
    dialer = dial()
    enter(hub, dialer, token)

    def talk() -> None:
        for _ in range(100):
            dialer.send(Staged())

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert all(isinstance(hub.receive(5), Received) for _ in range(400))
    for thread in threads:
        thread.join()


def test_a_deadline_passes_and_the_channel_goes_on(hub: Hub, token: str, dial: Dial) -> None:
    dialer = dial()
    enter(hub, dialer, token)
    with pytest.raises(TransferTimeoutError, match=r"0\.05 s"):
        hub.receive(0.05)
    with pytest.raises(TransferTimeoutError, match=r"0\.05 s"):
        dialer.receive(0.05)
    dialer.send(Staged())
    assert isinstance(hub.receive(5), Received)


# ---- who is admitted


def test_a_wrong_token_is_refused_with_the_reason(
    hub: Hub, token: str, dial: Dial, caplog: pytest.LogCaptureFixture
) -> None:
    intruder = dial()
    with caplog.at_level(logging.WARNING):
        intruder.send(hello("wrong"))
        intruder.send(Staged())
        with pytest.raises(RemoteProtocolError, match=r"receiver a\[0\] presented a token"):
            intruder.receive(5)
        assert_hub_lives(hub, dial(), token)
    assert len(caplog.records) == 1
    assert "wrong" not in caplog.text.replace("is wrong", "")


def test_a_token_admits_no_more_peers_than_expected(hub: Hub, dial: Dial) -> None:
    token = new_token()
    hub.admit(token, uses=1)
    enter(hub, dial(), token)
    late = dial()
    late.send(hello(token))
    with pytest.raises(RemoteProtocolError, match="token"):
        late.receive(5)


def test_a_revoked_token_admits_nobody_but_keeps_who_is_in(hub: Hub, token: str, dial: Dial) -> None:
    dialer, late = dial(), dial()
    peer = enter(hub, dialer, token)
    hub.revoke(token)
    late.send(hello(token))
    with pytest.raises(RemoteProtocolError):
        late.receive(5)
    hub.send(peer, Prepare())
    assert dialer.receive(5) == Prepare()


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"", b""],
        [b"HDRC", b"x"],
        [b"GET / HTTP/1.1"],
        [encode(Staged())[0], b"\xc1\xff"],
        [encode(Staged())[0], b"\x81\xa4type\xabHolderHello"],
        [encode(Staged())[0], os.urandom(1000)],
        [os.urandom(200_000)],
        [encode(Staged())[0]] * 40,
        encode(Staged()),
        encode(Prepare()),
    ],
    ids=range(11),
)
def test_a_first_message_that_is_no_hello_is_refused(
    hub: Hub, token: str, dial: Dial, raw: RawDial, frames: list[bytes]
) -> None:
    intruder = raw()
    intruder.send_multipart(frames)
    assert intruder.poll(5000)
    answer = decode(intruder.recv_multipart())
    assert isinstance(answer, Refused)
    assert isinstance(answer.failure.to_error(), RemoteProtocolError)
    assert_hub_lives(hub, dial(), token)


def test_another_protocol_version_is_told_so(hub: Hub, token: str, dial: Dial, raw: RawDial) -> None:
    stranger = raw()
    stranger.send_multipart([struct.pack("<4sH", b"HDRC", 999), b"whatever that version says"])
    assert stranger.poll(5000)
    answer = decode(stranger.recv_multipart())
    assert isinstance(answer, Refused)
    error = answer.failure.to_error()
    assert isinstance(error, VersionSkewError)
    assert "999" in str(error)
    assert_hub_lives(hub, dial(), token)


def test_bytes_that_are_not_zeromq_do_no_harm(hub: Hub, token: str, dial: Dial) -> None:
    port = int(hub.endpoint.rpartition(":")[2])
    for junk in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b""):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
            plain.sendall(junk)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    unencrypted = context.socket(zmq.DEALER)
    unencrypted.connect(hub.endpoint)
    unencrypted.send_multipart(encode(hello(token)))
    assert_hub_lives(hub, dial(), token)
    with pytest.raises(TransferTimeoutError):
        hub.receive(0.2)
    context.destroy(linger=0)


def test_garbage_from_an_admitted_peer_loses_only_that_peer(
    hub: Hub, token: str, dial: Dial, raw: RawDial
) -> None:
    broken = raw()
    broken.send_multipart(encode(HolderHello(token=token, index=2, pid=1)))
    assert isinstance(hub.receive(5), Received)
    broken.send_multipart([b"junk"])
    for _ in range(100):
        broken.send_multipart(encode(Staged()))
    event = hub.receive(5)
    assert isinstance(event, Lost)
    assert "broke the protocol" in event.reason
    broken.send_multipart(encode(Staged()))
    assert_hub_lives(hub, dial(), token)


# ---- how loss is told


def test_a_closed_peer_is_lost_after_its_last_message(hub: Hub, token: str, dial: Dial) -> None:
    for _ in range(20):
        dialer = dial()
        peer = enter(hub, dialer, token)
        dialer.send(Staged())
        dialer.close()
        assert hub.receive(5) == Received(peer, Staged())
        event = hub.receive(5)
        assert isinstance(event, Lost)
        assert event.peer == peer


def test_last_words_are_heard_before_a_failed_send_tells_of_the_loss(
    hub: Hub, token: str, dial: Dial
) -> None:
    dialer = dial()
    peer = enter(hub, dialer, token)
    busy, gone = threading.Event(), threading.Event()
    hub._submit(lambda: (busy.set(), gone.wait(10)))
    assert busy.wait(5)
    dialer.send(Staged())
    dialer.close(linger_s=2.0)
    time.sleep(0.3)
    hub.send(peer, Staged())
    gone.set()
    first, second = hub.receive(5), hub.receive(5)
    assert isinstance(first, Received)
    assert isinstance(first.message, Staged)
    assert isinstance(second, Lost)


def test_a_killed_peer_is_lost_at_once(hub: Hub, spawn: Spawn) -> None:
    process = spawn("echo")
    assert isinstance(hub.receive(20), Received)
    process.kill()
    event = hub.receive(1)
    assert isinstance(event, Lost)
    assert str(event.peer) == "holder 7"


def test_a_silent_peer_is_lost_after_the_heartbeat_limit() -> None:
    with Hub(HOST, heartbeat_s=0.6) as hub:
        token = new_token()
        hub.admit(token)
        command = [sys.executable, str(PEER_SCRIPT), "echo", hub.endpoint, hub.server_key, token]
        with subprocess.Popen(command) as process:
            assert isinstance(hub.receive(20), Received)
            process.send_signal(signal.SIGSTOP)
            event = hub.receive(3)
            process.kill()
        assert isinstance(event, Lost)
        assert "0.6 s" in event.reason


def test_a_peer_that_holds_its_gil_is_kept(hub: Hub, spawn: Spawn) -> None:
    spawn("hog")
    first, second = hub.receive(20), hub.receive(10)
    assert isinstance(first, Received)
    assert second == Received(first.peer, Prepared())


def test_idle_peers_stay_alive_by_heartbeats() -> None:
    with Hub(HOST, heartbeat_s=0.4) as hub, Dialer(hub.endpoint, hub.server_key, heartbeat_s=0.4) as dialer:
        token = new_token()
        hub.admit(token)
        time.sleep(0.6)
        peer = enter(hub, dialer, token)
        with pytest.raises(TransferTimeoutError):
            hub.receive(1.2)
        hub.send(peer, Prepare())
        assert dialer.receive(5) == Prepare()


def test_a_forgotten_peer_is_neither_heard_nor_lost(hub: Hub, token: str, dial: Dial) -> None:
    dialer = dial()
    peer = enter(hub, dialer, token)
    hub.forget(peer)
    hub.forget(peer)
    dialer.send(Staged())
    dialer.close()
    with pytest.raises(TransferTimeoutError):
        hub.receive(0.2)
    hub.send(peer, Prepare())
    assert_hub_lives(hub, dial(), token)


def test_the_end_of_the_hub_reaches_every_dialer_after_its_last_message(
    token: str, hub: Hub, dial: Dial
) -> None:
    dialer = dial()
    peer = enter(hub, dialer, token)
    hub.send(peer, Abort("over"))
    hub.close()
    assert dialer.receive(5) == Abort("over")
    for _ in range(2):
        with pytest.raises(PeerLostError, match="coordinator"):
            dialer.receive(5)
    dialer.send(Staged())


def test_a_silent_coordinator_is_lost() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    keys, mute = KeyPair.new(), context.socket(zmq.ROUTER)
    mute.curve_server, mute.curve_secretkey = True, keys.secret.encode()
    mute.bind("tcp://127.0.0.1:*")
    with Dialer(mute.get_string(zmq.LAST_ENDPOINT), keys.public, heartbeat_s=0.3) as dialer:
        dialer.send(hello("x"))
        with pytest.raises(PeerLostError, match=r"silent for 0\.3 s"):
            dialer.receive(5)
    context.destroy(linger=0)


def test_nothing_listening_is_a_connect_error() -> None:
    with Dialer("tcp://127.0.0.1:9", KeyPair.new().public, connect_s=0.2) as dialer:
        dialer.send(hello("x"))
        with pytest.raises(ConnectError, match="HEADRACE_ADVERTISE"):
            dialer.receive()


def test_a_wrong_server_key_is_a_connect_error(hub: Hub, token: str, dial: Dial) -> None:
    with Dialer(hub.endpoint, KeyPair.new().public, connect_s=0.3) as dialer:
        dialer.send(hello(token))
        with pytest.raises(ConnectError, match="server key"):
            dialer.receive()
    assert_hub_lives(hub, dial(), token)


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1", "ftp://x:1"])
def test_a_malformed_endpoint_is_a_config_error(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="cannot dial"):
        Dialer(endpoint, KeyPair.new().public)


def test_a_malformed_key_is_a_config_error(hub: Hub) -> None:
    with pytest.raises(ConfigError, match="cannot dial"):
        Dialer(hub.endpoint, "short")


def test_an_address_that_is_not_ours_is_a_config_error() -> None:
    elsewhere = HostSettings(
        socket_dir=Path("/nonexistent"), permitted_uids=frozenset(), bind_host="192.0.2.1"
    )
    with pytest.raises(ConfigError, match="HEADRACE_BIND"):
        Hub(elsewhere)


def test_the_advertised_address_is_the_endpoint() -> None:
    host = HostSettings(
        socket_dir=Path("/nonexistent"),
        permitted_uids=frozenset(),
        bind_host="0.0.0.0",
        advertise_host="node-7",
    )
    with Hub(host) as hub:
        assert hub.endpoint.startswith("tcp://node-7:")


# ---- closing


def test_after_close_every_call_says_so(hub: Hub, token: str, dial: Dial) -> None:
    dialer = dial()
    peer = enter(hub, dialer, token)
    dialer.close()
    dialer.close()
    assert isinstance(hub.receive(5), Lost)
    hub.close()
    hub.close()
    calls: list[Callable[[], object]] = [
        dialer.receive,
        lambda: dialer.send(Staged()),
        lambda: hub.send(peer, Prepare()),
        lambda: hub.forget(peer),
    ]
    for call in calls:
        with pytest.raises(TransportClosedError):
            call()
    with pytest.raises(TransportClosedError):
        hub.receive(1)


def test_close_wakes_a_waiting_receive(hub: Hub, dial: Dial) -> None:
    dialer, seen = dial(), []

    def wait() -> None:
        try:
            dialer.receive()
        except HeadraceError as error:
            seen.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    dialer.close()
    thread.join(5)
    assert seen == [TransportClosedError]


def test_nothing_is_left_open(hub: Hub, token: str) -> None:
    def visit() -> None:
        with Dialer(hub.endpoint, hub.server_key) as dialer:
            enter(hub, dialer, token)
        assert isinstance(hub.receive(5), Lost)

    visit()
    before = snapshot([])
    for _ in range(10):
        visit()
    assert left_over(before, []) == []
