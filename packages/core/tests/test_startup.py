"""Processes that start: dead, slow by themselves, or kept from the cores by others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from headrace.errors import HeadraceError, PeerLostError, TransferTimeoutError
from headrace.server import startup
from headrace.server.startup import CoreTime, Startup

BUSY = "while True: pass"
Run = Callable[[str], "subprocess.Popen[bytes]"]


@pytest.fixture
def run() -> Iterator[Run]:
    """Run Python code in processes that end with the test."""
    made: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen([sys.executable, "-S", "-c", code]))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()


def check_until_late(found: Startup, limit_s: float) -> tuple[HeadraceError, float]:
    """Check again and again; return the error and the seconds until then."""
    begin = time.monotonic()
    while time.monotonic() - begin < limit_s:
        try:
            found.check()
        except HeadraceError as error:
            return error, time.monotonic() - begin
        time.sleep(0.05)
    pytest.fail(f"no error within {limit_s} s")


def test_one_that_ended_says_how(run: Run) -> None:
    error, _ = check_until_late(Startup(run("raise SystemExit(7)"), "the process of holder 3"), 30)
    assert isinstance(error, PeerLostError)
    assert "holder 3 ended with code 7" in str(error)


def test_one_that_only_sleeps_is_late(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "STARTUP_S", 1.0)
    error, _ = check_until_late(Startup(run("import time; time.sleep(60)"), "it"), 30)
    assert isinstance(error, TransferTimeoutError)
    assert "stood in line" not in str(error)


def test_one_that_gets_no_core_has_longer_and_the_error_says_why(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel runs it only where nobody else wants the core, and somebody always does."""
    starved, greedy = run(BUSY), run(BUSY)
    core = {min(os.sched_getaffinity(0))}
    for process in (starved, greedy):
        os.sched_setaffinity(process.pid, core)
    os.sched_setscheduler(starved.pid, os.SCHED_IDLE, os.sched_param(0))
    monkeypatch.setattr(startup, "STARTUP_S", 3.0)
    monkeypatch.setattr(startup, "LONGEST_STARTUP_S", 6.0)
    error, seconds = check_until_late(Startup(starved, "it"), 30)
    assert seconds > 5.9
    assert isinstance(error, TransferTimeoutError)
    assert error.retryable
    assert "stood in line for a core" in str(error)
    assert CoreTime.of(starved.pid).ran_s < 3.0


def test_a_process_that_is_gone_had_nothing() -> None:
    assert CoreTime.of(2**22 + 1) == CoreTime()
