"""Jobs of transports that read in background threads: whatever ends a wait early, it never looks like success."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace.errors import PeerLostError, TransferTimeoutError, TransportClosedError
from headrace.futures import wait_ended
from headrace.transports.jobs import ReadBoard

LONG_S = 30.0


class Reads:
    """A job whose reads last until it is given up."""

    peers = "somebody"

    def __init__(self) -> None:
        self.gone = threading.Event()

    def abort(self) -> None:
        self.gone.set()

    def read(self) -> None:
        self.gone.wait(LONG_S)
        raise PeerLostError("given up")


@pytest.fixture
def board() -> Iterator[ReadBoard]:
    board = ReadBoard("test", 1)
    yield board
    board.close()
    board.join()


def ends(call: Callable[[], object]) -> float:
    """Return how long a wait of another thread lasted that `close` has ended."""
    begin = time.monotonic()
    with pytest.raises(TransportClosedError):
        call()
    return time.monotonic() - begin


def test_a_wait_for_reads_that_never_began_ends_with_the_transport(board: ReadBoard) -> None:
    """One thread is at the first job, so that nothing of the second is begun."""
    jobs = [Reads(), Reads()]
    numbers = [board.start(job, [job.read, job.read]) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(ends, lambda number=number: board.wait(number, LONG_S)) for number in numbers]
        time.sleep(0.1)
        board.close()
        assert max(wait.result() for wait in waits) < 3.0


def test_a_job_that_is_half_done_when_the_transport_is_closed_is_not_done(board: ReadBoard) -> None:
    job, half = Reads(), threading.Event()
    number = board.start(job, [lambda: half.wait(LONG_S) and None, lambda: None])
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(ends, lambda: board.wait(number, LONG_S))
        time.sleep(0.1)
        board.close()
        half.set()
        assert wait.result() < 3.0


def test_a_job_that_is_late_is_given_up_with_all_that_did_not_begin(board: ReadBoard) -> None:
    job = Reads()
    number, begin = board.start(job, [job.read] * 50), time.monotonic()
    with pytest.raises(TransferTimeoutError, match="somebody"):
        board.wait(number, 0.1)
    assert job.gone.is_set()
    assert time.monotonic() - begin < 3.0


def test_what_was_cancelled_has_ended() -> None:
    release, pool = threading.Event(), ThreadPoolExecutor(1)
    futures = [pool.submit(release.wait, LONG_S) for _ in range(3)]
    pool.shutdown(wait=False, cancel_futures=True)
    assert wait_ended(futures, 0.05) == {futures[0]}
    release.set()
    assert wait_ended(futures, LONG_S) == set()
    assert wait_ended([], None) == set()


def test_the_first_failure_ends_a_wait_that_asks_for_it() -> None:
    release, job = threading.Event(), Reads()
    job.abort()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(release.wait, LONG_S), pool.submit(job.read)]
        assert wait_ended(futures, LONG_S, first_failure=True) == {futures[0]}
        assert wait_ended(futures, 0.05) == {futures[0]}
        release.set()
