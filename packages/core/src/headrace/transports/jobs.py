"""ReadBoard: the jobs of a transport that reads in background threads - numbers, waits with a deadline, the end."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from headrace.errors import LocalProtocolError, TransferTimeoutError, TransportClosedError
from headrace.futures import wait_ended

_ABORT_S = 5.0
P = TypeVar("P")


class Job(Protocol):
    """Reads that are waited for together."""

    @property
    def peers(self) -> str:
        """Who is read from, for messages."""
        ...

    def abort(self) -> None:
        """Give up what is under way; afterwards nothing of it lands, and nothing of it begins."""
        ...


class ReadBoard:
    """Runs reads and keeps their jobs until each was waited for once. Safe from several threads.

    Args:
        name: The transport's name.
        num_readers: Most threads; they are started when they are first needed.
    """

    def __init__(self, name: str, num_readers: int) -> None:
        self.lock = threading.Lock()
        self._name = name
        self._num_readers = num_readers
        self._numbers = itertools.count(1)
        self._jobs: dict[int, tuple[Job, list[Future[None]]]] = {}
        self._readers: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def check_open(self) -> None:
        """Raise TransportClosedError after `close`."""
        if self._closed:
            raise self.closed_error()

    def closed_error(self) -> TransportClosedError:
        """Return the error of a transport that was closed."""
        return TransportClosedError(f"the {self._name} transport was closed", name=self._name)

    def find(self, places: Mapping[str, P], segment_id: str) -> P:
        """Return where an open segment lies, by the transport's table of those.

        Raises:
            LocalProtocolError: It was not opened.
        """
        with self.lock:
            self.check_open()
            found = places.get(segment_id)
        if found is None:
            message = f"segment {segment_id} is not open; open it first"
            raise LocalProtocolError(message, name=segment_id)
        return found

    def start(self, job: Job, reads: Sequence[Callable[[], None]]) -> int:
        """Begin a job's reads in background threads and return its number."""
        with self.lock:
            self.check_open()
            if self._readers is None:
                self._readers = ThreadPoolExecutor(self._num_readers, f"headrace-{self._name}-read")
            number = next(self._numbers)
            self._jobs[number] = (job, [self._readers.submit(read) for read in reads])
        return number

    def wait(self, number: int, deadline_s: float) -> None:
        """Wait for a job; where it fails or is late it is given up, and nothing of it lands any more.

        Raises:
            LocalProtocolError: There is no such job, or it was waited for before.
            TransferTimeoutError: It was not done within the deadline.
            HeadraceError: A read failed.
        """
        with self.lock:
            self.check_open()
            found = self._jobs.get(number)
        if found is None:
            message = f"job {number} is unknown; each job is waited for once"
            raise LocalProtocolError(message)
        try:
            self._finish(*found, deadline_s)
        finally:
            with self.lock:
                self._jobs.pop(number, None)

    def close(self) -> None:
        """Take no more jobs and give all up; idempotent. Threads may still be at it until `join`."""
        with self.lock:
            self._closed = True
            jobs = list(self._jobs.values())
        for job, reads in jobs:
            _give_up(job, reads)

    def join(self) -> None:
        """Wait for the threads after `close`."""
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)

    def _finish(self, job: Job, reads: Sequence[Future[None]], deadline_s: float) -> None:
        pending = wait_ended(reads, max(0.0, deadline_s), first_failure=True)
        failed = next((error for read in reads if (error := _failure(read)) is not None), None)
        if failed is None and not pending and not any(read.cancelled() for read in reads):
            return
        _give_up(job, reads)
        wait_ended(reads, _ABORT_S)
        self.check_open()
        if failed is not None:
            raise failed
        message = f"reading from {job.peers} over {self._name} was not done within {deadline_s:g} s"
        raise TransferTimeoutError(message, name=job.peers, retryable=True)


def _give_up(job: Job, reads: Sequence[Future[None]]) -> None:
    job.abort()
    for read in reads:
        read.cancel()


def _failure(read: Future[None]) -> BaseException | None:
    return read.exception() if read.done() and not read.cancelled() else None
