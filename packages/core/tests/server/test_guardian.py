"""The guardian's handle outlives its guardian: an update goes on, and is guarded again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from headrace.config import EngineTarget
from headrace.server.guardian import Guardian

TARGETS = [EngineTarget(f"torch=http://127.0.0.1:{port}") for port in (1, 2)]


@pytest.fixture
def guardian() -> Iterator[Guardian]:
    guardian = Guardian()
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
