"""Reads over TCP: the suite, and what strangers and broken peers do."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.config import HostSettings
from headrace.errors import (
    ConfigError,
    ConnectError,
    PeerLostError,
    ProtocolError,
    RemoteProtocolError,
    TransportClosedError,
    VersionSkewError,
)
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.testing.copies import CopyRow, content, table_of
from headrace.testing.leaks import left_over, snapshot
from headrace.testing.transport_holder import HolderProcess
from headrace.testing.transport_suite import TransportTests
from headrace.transports import TcpServer, TcpTransport
from headrace.transports import tcp_server as server_module
from headrace.transports.rows import Rows
from headrace.transports.tcp_frames import READ, Line, ReadRequest, introduce, receive_reply, send_request

HOST = HostSettings(socket_dir=Path("/nonexistent"), permitted_uids=frozenset())
SECRET = secrets.token_bytes(32)
SIZE = 1 << 20
SEGMENT = SegmentDescriptor("a", SIZE)
WHOLE = table_of([CopyRow(shape=(SIZE // 2,), src_strides=(2,), dst_strides=(2,))])

pytestmark = pytest.mark.timeout(60)


class TestTcpTransport(TransportTests):
    def make_transport(self) -> TcpTransport:
        return TcpTransport()

    def test_a_holder_that_dies_in_the_middle(self, host: HostSettings) -> None:
        with HolderProcess(type(self).serve, host) as holder:
            transport = TcpTransport()
            transport.open(holder.address, holder.segments[0], 5)
            rows = [CopyRow(shape=(1 << 19,), src_strides=(2,), dst_strides=(2,)) for _ in range(400)]
            timer = threading.Timer(0.02, holder.kill)
            job = transport.submit(
                table_of(rows), holder.segments[:1], [torch.zeros(1 << 20, dtype=torch.uint8)]
            )
            timer.start()
            begin_s = time.monotonic()
            with pytest.raises(PeerLostError):
                transport.wait(job, 30)
            assert time.monotonic() - begin_s < 5
            timer.join()
            transport.close()


@pytest.fixture
def data() -> torch.Tensor:
    return content(0, SIZE).clone()


@pytest.fixture
def server(data: torch.Tensor) -> Iterator[TcpServer]:
    with TcpServer({"a": data}.get, SECRET, HOST) as made:
        yield made


@pytest.fixture
def address(server: TcpServer) -> HolderAddress:
    return HolderAddress("h", tcp_endpoint=server.endpoint, tcp_secret=SECRET)


@pytest.fixture
def transport() -> Iterator[TcpTransport]:
    made = TcpTransport()
    yield made
    made.close()


def dial(server: TcpServer) -> socket.socket:
    host, _, port = server.endpoint.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def assert_served(address: HolderAddress, data: torch.Tensor) -> None:
    transport, block = TcpTransport(), torch.zeros(SIZE, dtype=torch.uint8)
    transport.open(address, SEGMENT, 5)
    transport.wait(transport.submit(WHOLE, [SEGMENT], [block]), 10)
    transport.close()
    assert torch.equal(block, data)


# ---- strangers


def test_a_wrong_secret_is_refused_and_logged(
    address: HolderAddress, data: torch.Tensor, transport: TcpTransport, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectError, match="secret"):
        transport.open(replace(address, tcp_secret=b"guessed" * 5), SEGMENT, 5)
    assert_served(address, data)
    assert "does not know this holder's secret" in caplog.text
    assert "guessed" not in caplog.text


@pytest.mark.parametrize(
    "junk", [b"", b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(70), b"HRTC", os.urandom(100_000)]
)
def test_garbage_does_no_harm(
    server: TcpServer, address: HolderAddress, data: torch.Tensor, junk: bytes
) -> None:
    with dial(server) as stranger, suppress(OSError):
        stranger.sendall(junk)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(1000):
            pass
    assert_served(address, data)


def test_another_version_is_named(address: HolderAddress, transport: TcpTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(struct.pack("<4sH32s", b"HRTC", 77, bytes(32)))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(VersionSkewError, match="77"):
            transport.open(replace(address, tcp_endpoint=f"127.0.0.1:{port}"), SEGMENT, 5)
        thread.join()


def test_a_server_that_does_not_know_the_secret_is_not_trusted(
    address: HolderAddress, transport: TcpTransport
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def pretend() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(struct.pack("<4sH32s", b"HRTC", 1, bytes(32)))
                connection.recv(1000)
                connection.sendall(bytes(32))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(ConnectError, match="does not know the secret"):
            transport.open(replace(address, tcp_endpoint=f"127.0.0.1:{port}"), SEGMENT, 5)
        thread.join()


def test_a_listener_that_says_nothing_is_left_at_the_deadline(
    address: HolderAddress, transport: TcpTransport
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        begin_s = time.monotonic()
        with pytest.raises(ConnectError):
            transport.open(replace(address, tcp_endpoint=f"127.0.0.1:{port}"), SEGMENT, 0.3)
        assert time.monotonic() - begin_s < 3


@pytest.mark.parametrize("endpoint", ["", "nowhere", "127.0.0.1:9", "127.0.0.1:99999", "[::1]:x", ":::"])
def test_an_address_where_nobody_is(endpoint: str, transport: TcpTransport) -> None:
    with pytest.raises(ConnectError):
        transport.open(HolderAddress("h", tcp_endpoint=endpoint, tcp_secret=SECRET), SEGMENT, 1)


# ---- clients that know the secret and ask for nonsense


def known(server: TcpServer) -> Line:
    line = Line(dial(server), "test", 5)
    introduce(line, SECRET, 5)
    return line


def rows_of(**changes: object) -> Rows:
    columns: dict[str, np.ndarray] = {
        "block": np.zeros(1, np.int32),
        "base": np.zeros(1, np.int64),
        "strides": np.array([[2]]),
        "shape": np.array([[8]]),
        "dtype": np.zeros(1, np.uint8),
    }
    for name, value in changes.items():
        columns[name][...] = value
    return Rows(**columns)


@pytest.mark.parametrize(
    "rows",
    [
        rows_of(base=SIZE - 15),
        rows_of(base=-1),
        rows_of(base=2**62),
        rows_of(shape=SIZE),
        rows_of(shape=-1),
        rows_of(shape=2**62),
        rows_of(strides=SIZE),
        rows_of(strides=-2),
        rows_of(strides=2**62, shape=2**62),
        rows_of(strides=0, shape=2**45),
        rows_of(block=1),
        rows_of(block=-1),
        rows_of(dtype=200),
    ],
    ids=range(13),
)
def test_a_request_that_reaches_outside_is_refused(server: TcpServer, rows: Rows) -> None:
    line = known(server)
    send_request(line, READ, ReadRequest(("a",), rows).encode())
    with pytest.raises(RemoteProtocolError, match="refused"):
        receive_reply(line)
    send_request(line, READ, ReadRequest(("a",), rows_of()).encode())
    assert receive_reply(line) == 16
    line.close()


def test_damaged_requests_are_refused(server: TcpServer, data: torch.Tensor) -> None:
    good = ReadRequest(("a",), rows_of()).encode()
    line = known(server)
    for body in (b"", good[:-1], good + b"x", b"\xff" * 7, b"\xff" * 300, os.urandom(50)):
        send_request(line, READ, body)
        with pytest.raises(RemoteProtocolError, match="refused"):
            receive_reply(line)
    send_request(line, 99, b"")
    with pytest.raises(RemoteProtocolError, match="unknown request"):
        receive_reply(line)
    send_request(line, READ, ReadRequest(("b",), rows_of()).encode())
    with pytest.raises(RemoteProtocolError, match="not held"):
        receive_reply(line)
    send_request(line, READ, good)
    assert line.receive(receive_reply(line) + 0) == data[:16].numpy().tobytes()
    line.close()


def test_a_request_without_end_is_dropped(
    server: TcpServer, address: HolderAddress, data: torch.Tensor
) -> None:
    line = known(server)
    line.send([struct.pack("<BI", READ, 2**32 - 1)])
    with pytest.raises(PeerLostError):
        line.receive(1)
    line.close()
    assert_served(address, data)


def test_requests_survive_the_wire() -> None:
    request = ReadRequest(("a", "ü"), rows_of(base=7, shape=3))
    decoded = ReadRequest.decode(request.encode())
    assert decoded.segment_ids == request.segment_ids
    for name in ("block", "base", "strides", "shape", "dtype"):
        assert np.array_equal(getattr(decoded.rows, name), getattr(request.rows, name))
    with pytest.raises(ProtocolError):
        ReadRequest.decode(request.encode()[:20])


def test_a_client_that_stalls_loses_its_thread(data: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_SILENCE_S", 0.3)
    monkeypatch.setattr(server_module, "_GREET_S", 0.3)
    before = threading.active_count()
    with TcpServer({"a": data}.get, SECRET, HOST) as server:
        silent, stalled = dial(server), known(server)
        rows = rows_of(strides=0, shape=1 << 30)
        send_request(stalled, READ, ReadRequest(("a",), rows).encode())
        deadline_s = time.monotonic() + 10
        while threading.active_count() > before + 1 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert threading.active_count() == before + 1
        silent.close()
        stalled.close()


# ---- the client's side


def test_a_segment_of_another_size_is_refused(address: HolderAddress, transport: TcpTransport) -> None:
    with pytest.raises(ConnectError, match="announced"):
        transport.open(address, SegmentDescriptor("a", SIZE + 1), 5)


def test_a_segment_released_meanwhile_is_told(data: torch.Tensor, transport: TcpTransport) -> None:
    held = {"a": data}
    with TcpServer(held.get, SECRET, HOST) as server:
        transport.open(HolderAddress("h", tcp_endpoint=server.endpoint, tcp_secret=SECRET), SEGMENT, 5)
        held.clear()
        job = transport.submit(WHOLE, [SEGMENT], [torch.zeros(SIZE, dtype=torch.uint8)])
        with pytest.raises(RemoteProtocolError, match="not held"):
            transport.wait(job, 5)


def test_large_jobs_use_several_connections(data: torch.Tensor, transport: TcpTransport) -> None:
    large = torch.arange(5 << 21, dtype=torch.int64).view(torch.uint8)
    segment = SegmentDescriptor("large", large.numel())
    with TcpServer({"large": large}.get, SECRET, HOST) as server:
        transport.open(HolderAddress("h", tcp_endpoint=server.endpoint, tcp_secret=SECRET), segment, 5)
        block = torch.zeros(large.numel() * 2, dtype=torch.uint8)
        halves = table_of([
            CopyRow(shape=(10 << 20, 4), src_strides=(8, 2), dst_strides=(8, 2)),
            CopyRow(shape=(10 << 20, 2), src_strides=(8, 2), dst_strides=(4, 2),
                    src_base=4, dst_base=large.numel()),
        ])  # fmt: skip
        transport.wait(transport.submit(halves, [segment], [block]), 30)
        assert torch.equal(block[: large.numel()], large)
        tail = block[large.numel() : large.numel() // 2 * 3]
        assert torch.equal(tail.view(-1, 4), large.view(-1, 8)[:, 4:])
        assert 2 <= len(server._lines) <= 4


def test_several_holders_fill_one_block(data: torch.Tensor, transport: TcpTransport) -> None:
    other = content(1, SIZE)
    second = SegmentDescriptor("b", SIZE)
    with TcpServer({"a": data}.get, SECRET, HOST) as one, TcpServer({"b": other}.get, SECRET, HOST) as two:
        transport.open(HolderAddress("h1", tcp_endpoint=one.endpoint, tcp_secret=SECRET), SEGMENT, 5)
        transport.open(HolderAddress("h2", tcp_endpoint=two.endpoint, tcp_secret=SECRET), second, 5)
        block = torch.zeros(SIZE * 2, dtype=torch.uint8)
        rows = [
            CopyRow(shape=(SIZE // 2,), src_strides=(2,), dst_strides=(2,), src_block=i, dst_base=i * SIZE)
            for i in (1, 0)
        ]
        transport.wait(transport.submit(table_of(rows), [SEGMENT, second], [block]), 10)
        assert torch.equal(block, torch.cat([data, other]))


def test_live_tensors_are_destinations_too(
    address: HolderAddress, data: torch.Tensor, transport: TcpTransport
) -> None:
    transport.open(address, SEGMENT, 5)
    live = torch.nn.Parameter(torch.zeros(40, 30, dtype=torch.bfloat16).t())
    copies = table_of([CopyRow(shape=(40, 30), src_strides=(60, 2), dst_strides=(60, 2))])
    transport.wait(transport.submit(copies, [SEGMENT], [live]), 5)
    assert (
        live.detach().t().contiguous().view(torch.uint8).flatten().numpy().tobytes()
        == data[:2400].numpy().tobytes()
    )


def test_an_idle_connection_is_reused_and_a_dead_one_replaced(
    data: torch.Tensor, transport: TcpTransport
) -> None:
    first = TcpServer({"a": data}.get, SECRET, HOST)
    address = HolderAddress("h", tcp_endpoint=first.endpoint, tcp_secret=SECRET)
    transport.open(address, SEGMENT, 5)
    block = torch.zeros(SIZE, dtype=torch.uint8)
    for _ in range(3):
        transport.wait(transport.submit(WHOLE, [SEGMENT], [block]), 5)
    assert len(first._lines) == 1
    for line in list(first._lines):
        line.abort()
    time.sleep(0.1)
    transport.wait(transport.submit(WHOLE, [SEGMENT], [block]), 5)
    assert torch.equal(block, data)
    transport.retain([])
    first.close()


def test_any_number_of_clients_take_turns(
    address: HolderAddress, data: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each keeps an idle connection; the server has room for three."""
    monkeypatch.setattr(server_module, "_MAX_CONNECTIONS", 3)
    transports = [TcpTransport() for _ in range(8)]
    for transport in (*transports, *transports):
        block = torch.zeros(SIZE, dtype=torch.uint8)
        transport.open(address, SEGMENT, 5)
        transport.wait(transport.submit(WHOLE, [SEGMENT], [block]), 10)
        assert torch.equal(block, data)
    for transport in transports:
        transport.close()


def test_close_ends_a_wait_in_another_thread(data: torch.Tensor) -> None:
    transport = TcpTransport()
    with TcpServer({"a": data}.get, SECRET, HOST) as server:
        transport.open(HolderAddress("h", tcp_endpoint=server.endpoint, tcp_secret=SECRET), SEGMENT, 5)
        rows = [CopyRow(shape=(SIZE // 2,), src_strides=(2,), dst_strides=(2,)) for _ in range(3000)]
        job = transport.submit(table_of(rows), [SEGMENT], [torch.zeros(SIZE, dtype=torch.uint8)])
        timer = threading.Timer(0.1, transport.close)
        timer.start()
        with pytest.raises(TransportClosedError):
            transport.wait(job, 30)
        timer.join()


def test_nothing_is_left_open(data: torch.Tensor) -> None:
    def visit() -> None:
        with TcpServer({"a": data}.get, SECRET, HOST) as server:
            assert_served(HolderAddress("h", tcp_endpoint=server.endpoint, tcp_secret=SECRET), data)

    visit()
    before = snapshot([])
    for _ in range(5):
        visit()
    assert left_over(before, []) == []


def test_settings_that_cannot_work() -> None:
    nothing: dict[str, torch.Tensor] = {}
    with pytest.raises(ConfigError, match="secret"):
        TcpServer(nothing.get, b"short", HOST)
    with pytest.raises(ConfigError, match="HEADRACE_BIND"):
        TcpServer(nothing.get, SECRET, replace(HOST, bind_host="192.0.2.1"))
