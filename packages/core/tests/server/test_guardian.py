"""The guardian's handle outlives its guardian: an update goes on, and is guarded again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.config import EngineTarget, HostSettings, host_settings
from headrace.server.guardian import Guardian

TARGETS = [EngineTarget(f"torch=http://127.0.0.1:{port}") for port in (1, 2)]


@pytest.fixture
def guardian() -> Iterator[Guardian]:
    guardian = Guardian(host_settings())
    guardian.start()
    yield guardian
    for target in TARGETS:
        guardian.resumed(target)
    guardian.close()


def kill(guardian: Guardian) -> int:
    process = guardian._process
    assert process is not None
    process.kill()
    process.wait(10)
    return process.pid


def test_a_guardian_that_died_before_the_pause_is_replaced(guardian: Guardian) -> None:
    dead = kill(guardian)
    guardian.paused(TARGETS[0])
    assert guardian._process is not None
    assert guardian._process.pid != dead
    assert guardian._process.poll() is None


def test_a_guardian_that_died_in_the_pause_does_not_fail_the_update(guardian: Guardian) -> None:
    guardian.paused(TARGETS[0])
    guardian.paused(TARGETS[1])
    dead = kill(guardian)
    guardian.resumed(TARGETS[0])
    assert guardian._process is not None
    assert guardian._process.pid != dead, "the other engine is still paused"
    assert guardian._process.poll() is None


def test_a_guardian_that_recovers_is_waited_for_and_not_killed() -> None:
    """Its engine takes longer to answer than a guardian without work may take to end."""
    guardian = Guardian(host_settings())
    guardian.start()
    process = guardian._process
    assert process is not None
    with socket.create_server(("127.0.0.1", 0)) as engine:
        guardian.paused(EngineTarget(f"torch=http://127.0.0.1:{engine.getsockname()[1]}"))
        dies = threading.Timer(8.0, engine.shutdown, (socket.SHUT_RDWR,))
        dies.start()
        guardian.close()
        dies.join()
    assert process.poll() == 1


def test_a_guardian_listens_where_its_updater_did(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """That address is nobody's here, and the guardian says so."""
    guardian = Guardian(HostSettings(socket_dir=tmp_path, permitted_uids=frozenset(), bind_host="203.0.113.7"))
    guardian.start()
    guardian.paused(TARGETS[0])
    guardian.close()
    assert "203.0.113.7" in capfd.readouterr().err
