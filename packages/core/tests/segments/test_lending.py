"""Lending: passing memory between processes, and everything that a peer may do wrong."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from headrace.config import HostSettings
from headrace.errors import (
    ConfigError,
    ConnectError,
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    TransferTimeoutError,
    VersionSkewError,
)
from headrace.manifest import SegmentDescriptor
from headrace.segments import HostSegment, Lender, borrow, probe
from headrace.segments.folders import sweep
from headrace.segments.frames import BORROW, HEAD, LENT, MAGIC, MAX_PAYLOAD, PROBE, VERSION, Caller, Frame

SOON = 5.0
HOLDER = """
import sys, time
from pathlib import Path
from headrace.config import HostSettings
from headrace.segments import HostSegment, Lender
import os
lender = Lender(HostSettings(socket_dir=Path(sys.argv[1]), permitted_uids=frozenset({os.getuid()}))).start()
segment = HostSegment(1 << 20, sys.argv[2])
segment.tensor.fill_(42)
lender.lend(segment)
print(lender.unix_socket, segment.descriptor.segment_id, flush=True)
time.sleep(60)
"""


@pytest.fixture
def settings(tmp_path: Path) -> HostSettings:
    return HostSettings(socket_dir=tmp_path / "s", permitted_uids=frozenset({os.getuid()}))


@pytest.fixture
def lender(settings: HostSettings) -> Iterator[Lender]:
    with Lender(settings) as started:
        yield started


@pytest.fixture
def segment() -> Iterator[HostSegment]:
    with HostSegment(100_003) as made:
        made.tensor.copy_(torch.arange(100_003) % 253)
        yield made


def test_a_borrowed_segment_is_the_same_memory(lender: Lender, segment: HostSegment) -> None:
    lender.lend(segment)
    assert lender.lend(segment) == segment.descriptor
    with borrow(lender.unix_socket, segment.descriptor, SOON) as mapped:
        assert torch.equal(mapped.tensor, segment.tensor)
        segment.tensor.fill_(9)
        assert torch.equal(mapped.tensor, segment.tensor)


def test_ring_slots_are_writable_on_both_sides(lender: Lender) -> None:
    with HostSegment(4096, peers_write=True) as ring:
        lender.lend(ring)
        borrow(lender.unix_socket, ring.descriptor, SOON, writable=True).tensor[17] = 3
        assert ring.tensor[17] == 3


def test_probe_tells_this_host_from_others(lender: Lender, tmp_path: Path) -> None:
    assert probe(lender.unix_socket, SOON)
    assert not probe("", SOON)
    assert not probe(str(tmp_path / "nowhere"), SOON)
    assert not probe(str(tmp_path / ("x" * 200)), SOON)
    assert not probe("a\0b", SOON)


def test_what_is_not_lent_is_refused(lender: Lender, segment: HostSegment) -> None:
    with pytest.raises(ConnectError, match="not lent"):
        borrow(lender.unix_socket, segment.descriptor, SOON)
    lender.lend(segment)
    mapped = borrow(lender.unix_socket, segment.descriptor, SOON)
    lender.withdraw(segment.descriptor.segment_id)
    lender.withdraw(segment.descriptor.segment_id)
    with pytest.raises(ConnectError, match="not lent"):
        borrow(lender.unix_socket, segment.descriptor, SOON)
    assert torch.equal(mapped.tensor, segment.tensor)


def test_a_closed_segment_cannot_be_lent(lender: Lender) -> None:
    closed = HostSegment(64)
    closed.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        lender.lend(closed)


def test_a_segment_closed_while_lent_stays_what_it_was(lender: Lender) -> None:
    short = HostSegment(64)
    short.tensor.fill_(3)
    lender.lend(short)
    short.close()
    other = os.memfd_create("takes-the-number")
    try:
        assert borrow(lender.unix_socket, short.descriptor, SOON).tensor.tolist() == [3] * 64
    finally:
        os.close(other)


def test_a_manifest_that_announces_more_than_there_is(lender: Lender, segment: HostSegment) -> None:
    lender.lend(segment)
    wrong = SegmentDescriptor(segment.descriptor.segment_id, segment.descriptor.num_bytes + 1)
    with pytest.raises(RemoteProtocolError, match="bytes"):
        borrow(lender.unix_socket, wrong, SOON)


def test_one_connection_serves_many_requests_and_leaks_no_descriptor(
    lender: Lender, segment: HostSegment
) -> None:
    lender.lend(segment)
    before = open_fds()
    caller = Caller(lender.unix_socket, SOON)
    for request in [Frame(PROBE), Frame(BORROW, segment.descriptor.segment_id.encode())] * 3:
        reply, fds = caller.call(request)
        assert (reply.kind, len(fds)) == (LENT, 1)
        os.close(fds[0])
    caller.close()
    with pytest.raises(RemoteProtocolError):
        borrow(lender.unix_socket, SegmentDescriptor(segment.descriptor.segment_id, 1 << 40), SOON)
    deadline = time.monotonic() + SOON
    while open_fds() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not open_fds() - before


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(100_000),
        HEAD.pack(MAGIC, VERSION, PROBE, MAX_PAYLOAD + 1),
        HEAD.pack(MAGIC, VERSION + 1, PROBE, 0),
        HEAD.pack(MAGIC, VERSION, 999, 0),
        HEAD.pack(MAGIC, VERSION, BORROW, 3) + b"\xff\xfe\x00",
        HEAD.pack(MAGIC, VERSION, PROBE, 0)[:7],
        b"",
    ],
)
def test_garbage_neither_kills_nor_blocks_the_lender(lender: Lender, garbage: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as rude, socket.socket(socket.AF_UNIX) as silent:
        silent.connect(lender.unix_socket)
        rude.connect(lender.unix_socket)
        rude.settimeout(SOON)
        try:
            rude.sendall(garbage)
        except OSError:
            assert len(garbage) > 1000
        assert probe(lender.unix_socket, SOON)
    assert probe(lender.unix_socket, SOON)


def test_a_peer_that_never_reads_is_dropped(lender: Lender) -> None:
    with socket.socket(socket.AF_UNIX) as greedy:
        greedy.connect(lender.unix_socket)
        greedy.settimeout(0.2)
        request = Frame(PROBE).encode() * 1000
        with pytest.raises(OSError):  # noqa: PT011 - broken pipe, reset or timeout
            greedy.sendall(request * 1000)
        assert probe(lender.unix_socket, SOON)


def test_many_connections_do_not_shut_others_out(lender: Lender) -> None:
    idle = []
    for _ in range(300):
        one = socket.socket(socket.AF_UNIX)
        one.connect(lender.unix_socket)
        idle.append(one)
    assert probe(lender.unix_socket, SOON)
    for one in idle:
        one.close()


def open_fds() -> set[str]:
    """Return what this process's descriptors are of: sockets and anonymous memory, each by its own name."""
    links = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            links.add(str(entry.readlink()))
    return {link for link in links if link.startswith(("socket:", "/memfd:"))}


def serve_once(path: Path, answer: bytes | None) -> threading.Thread:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        if answer is None:
            time.sleep(1.0)
        else:
            connection.recv(1000)
            connection.sendall(answer)
        connection.close()
        listener.close()

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", RemoteProtocolError),
        (HEAD.pack(MAGIC, 77, LENT, 0), VersionSkewError),
        (HEAD.pack(MAGIC, VERSION, LENT, 0), RemoteProtocolError),
        (HEAD.pack(MAGIC, VERSION, 55, 0), RemoteProtocolError),
        (HEAD.pack(MAGIC, VERSION, LENT, 100) + b"short", PeerLostError),
        (b"", PeerLostError),
        (None, TransferTimeoutError),
    ],
)
def test_a_strange_lender_is_an_error_of_its_kind(tmp_path: Path, answer: bytes | None, error: type) -> None:
    path = tmp_path / "fake"
    thread = serve_once(path, answer)
    with pytest.raises(error):
        borrow(str(path), SegmentDescriptor("x", 10), 0.3)
    thread.join(SOON)


def test_a_full_backlog_ends_at_the_deadline(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "full"))
        listener.listen(0)
        waiting = []
        for _ in range(3):
            one = socket.socket(socket.AF_UNIX)
            one.setblocking(False)
            one.connect_ex(str(tmp_path / "full"))
            waiting.append(one)
        with pytest.raises(TransferTimeoutError):
            probe(str(tmp_path / "full"), 0.2)
        for one in waiting:
            one.close()


def test_users_that_are_not_permitted_are_refused(tmp_path: Path, segment: HostSegment) -> None:
    strangers = HostSettings(socket_dir=tmp_path / "s", permitted_uids=frozenset({os.getuid() + 1}))
    with Lender(strangers) as lender:
        lender.lend(segment)
        assert not probe(lender.unix_socket, SOON)
        with pytest.raises(ConnectError, match=f"user {os.getuid()} is not permitted"):
            borrow(lender.unix_socket, segment.descriptor, SOON)


OTHER_USER = """
import os, sys
from headrace.manifest import SegmentDescriptor
from headrace.segments import borrow, probe
from headrace.errors import ConnectError
os.setgid(65534); os.setuid(65534)
print(probe(sys.argv[1], 5))
try:
    print(len(borrow(sys.argv[1], SegmentDescriptor(sys.argv[2], int(sys.argv[3])), 5).tensor))
except ConnectError as error:
    print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("permitted", [False, True])
def test_another_user_needs_permission(permitted: bool, segment: HostSegment) -> None:
    base = Path("/tmp") / f"hr-{secrets.token_hex(4)}"
    uids = {os.getuid(), 65534} if permitted else {os.getuid(), 65533}
    try:
        with Lender(HostSettings(socket_dir=base, permitted_uids=frozenset(uids))) as lender:
            lender.lend(segment)
            said = run_python(
                OTHER_USER,
                lender.unix_socket,
                segment.descriptor.segment_id,
                str(segment.descriptor.num_bytes),
            )
    finally:
        base.rmdir()
    if permitted:
        assert said == f"True\n{segment.descriptor.num_bytes}\n"
    else:
        assert said.startswith("False\n")
        assert "user 65534 is not permitted" in said


def run_python(code: str, *args: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *args], check=True, timeout=60, capture_output=True, text=True
    ).stdout


def test_nothing_is_left_after_a_holder_was_killed(settings: HostSettings) -> None:
    name = f"headrace-{secrets.token_hex(6)}"
    command = [sys.executable, "-c", HOLDER, str(settings.socket_dir), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        path, segment_id = holder.stdout.readline().split()
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        mapped = borrow(path, SegmentDescriptor(segment_id, 1 << 20), SOON)
        holder.send_signal(signal.SIGKILL)
        holder.wait(SOON)
    assert children == []
    assert bool((mapped.tensor == 42).all())
    assert not probe(path, SOON)
    assert len(users_of(name)) == 1
    del mapped
    assert users_of(name) == []
    assert Path(path).exists()
    with Lender(settings):
        assert not Path(path).parent.exists()
    assert list(settings.socket_dir.iterdir()) == []


def users_of(name: str) -> list[str]:
    """Return processes that map the memfd `name`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"/memfd:{name}" in (process / "maps").read_text():
                found.append(process.name)
        except OSError:
            continue
    return found


def test_a_sweep_leaves_the_living_and_strangers_alone(settings: HostSettings, lender: Lender) -> None:
    base = settings.socket_dir
    (base / "holder-1-dead").mkdir()
    (base / "holder-1-dead" / "lock").touch()
    (base / "holder-2-empty").mkdir()
    (base / "somebody-else").mkdir()
    (base / "holder-link").symlink_to(base / "somebody-else")
    (base / ".new-holder-3").mkdir()
    assert sweep(base) == 2
    left = {path.name for path in base.iterdir()}
    assert left == {"somebody-else", "holder-link", ".new-holder-3", Path(lender.unix_socket).parent.name}
    os.utime(base / ".new-holder-3", (0, 0))
    assert sweep(base) == 1
    assert probe(lender.unix_socket, SOON)


def test_sockets_are_private(lender: Lender, settings: HostSettings) -> None:
    folder = Path(lender.unix_socket).parent
    assert stat.S_IMODE(settings.socket_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(lender.unix_socket).stat().st_mode) == 0o600


def test_bad_folders_are_named_with_a_way_out(tmp_path: Path) -> None:
    own = frozenset({os.getuid()})
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for base in (tmp_path / ("d" * 100), tmp_path / "file", tmp_path / "open", tmp_path / "file" / "x"):
        with pytest.raises(ConfigError, match="HEADRACE_SOCKET_DIR"):
            Lender(HostSettings(socket_dir=base, permitted_uids=own)).start()


def test_users_who_are_permitted_later_pass_the_default_folder(tmp_path: Path) -> None:
    """It was made when there were none."""
    base, others = tmp_path / "s", frozenset({os.getuid(), os.getuid() + 1})
    for uids, mode in ((frozenset({os.getuid()}), 0o700), (others, 0o711)):
        with Lender(HostSettings(socket_dir=base, permitted_uids=uids, is_default_dir=True)):
            assert stat.S_IMODE(base.stat().st_mode) == mode


def test_a_chosen_folder_that_permitted_users_cannot_pass_is_refused(tmp_path: Path) -> None:
    others = frozenset({os.getuid(), os.getuid() + 1})
    for mode in (0o700, 0o710, 0o711):
        tmp_path.chmod(mode)
        lender = Lender(HostSettings(socket_dir=tmp_path, permitted_uids=others))
        if mode == 0o700:
            with pytest.raises(ConfigError, match="HEADRACE_PERMITTED_UIDS cannot pass it"):
                lender.start()
        else:
            lender.start().close()
        assert stat.S_IMODE(tmp_path.stat().st_mode) == mode


def test_close_is_idempotent_and_start_too(settings: HostSettings, segment: HostSegment) -> None:
    threads = threading.active_count()
    lender = Lender(settings)
    assert threading.active_count() == threads
    assert not settings.socket_dir.exists()
    lender.lend(segment)
    lender.start()
    path = lender.start().unix_socket
    assert borrow(path, segment.descriptor, SOON).tensor.shape == segment.tensor.shape
    lender.close()
    lender.close()
    assert threading.active_count() == threads
    assert list(settings.socket_dir.iterdir()) == []
    with pytest.raises(ConnectError, match="no holder"):
        borrow(path, segment.descriptor, SOON)


def test_who_closes_second_waits_until_the_folder_is_gone(
    settings: HostSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends for two reasons at once must not leave by the second before the first has cleared away."""
    lender = Lender(settings).start()
    socket_path, begun, remove = Path(lender.unix_socket), threading.Event(), lender._folder.remove

    def slow() -> None:
        begun.set()
        time.sleep(0.3)
        remove()

    monkeypatch.setattr(lender._folder, "remove", slow)
    first = threading.Thread(target=lender.close)
    first.start()
    assert begun.wait(10)
    lender.close()
    assert not socket_path.parent.exists()
    first.join()
