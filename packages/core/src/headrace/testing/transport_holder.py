"""Holders for tests of transports: real processes that serve segments of known content."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace.config import HostSettings
from headrace.errors import TransferTimeoutError
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.segments import HostSegment, Lender
from headrace.testing.copies import content
from headrace.transports.tcp_server import TcpServer

SEGMENT_BYTES = (1 << 20, 3 << 16)
_START_S = 60.0
_WAIT_S = 30.0
_SECRET = b"only for tests, known to everybody"

Serve = Callable[[Sequence[HostSegment], HostSettings], AbstractContextManager[HolderAddress]]


@contextmanager
def serve_memory_and_tcp(segments: Sequence[HostSegment], host: HostSettings) -> Iterator[HolderAddress]:
    """Lend and serve segments as a real holder does; runs in the holder's process."""
    by_id = {segment.descriptor.segment_id: segment.tensor for segment in segments}
    with Lender(host) as lender, TcpServer(by_id.get, _SECRET, host) as server:
        for segment in segments:
            lender.lend(segment)
        yield HolderAddress(f"holder-{os.getpid()}", lender.unix_socket, server.endpoint, _SECRET)


def _hold(serve: Serve, host: HostSettings, pipe: Connection) -> None:
    segments = [HostSegment(size, "headrace-test") for size in SEGMENT_BYTES]
    for index, segment in enumerate(segments):
        segment.tensor.copy_(content(index, segment.descriptor.num_bytes))
    with serve(segments, host) as address:
        pipe.send((address, tuple(segment.descriptor for segment in segments)))
        pipe.poll(None)
    os._exit(0)


class HolderProcess:
    """A holder in a real process: segments of `SEGMENT_BYTES`, filled with `content`.

    Attributes:
        address: Where to reach it.
        segments: Descriptors of its segments.
        pid: Its process.
    """

    def __init__(self, serve: Serve, host: HostSettings) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_hold, args=(serve, host, theirs), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(_START_S):
            self.kill()
            message = f"the test holder did not start within {_START_S:g} s"
            raise TransferTimeoutError(message)
        self.address: HolderAddress
        self.segments: tuple[SegmentDescriptor, ...]
        self.address, self.segments = self._pipe.recv()
        self.pid = self._process.pid or 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it without a word; idempotent."""
        self._process.kill()
        self._process.join(_WAIT_S)
        self._pipe.close()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let it hang while the body runs."""
        os.kill(self.pid, signal.SIGSTOP)
        while any(
            " T " not in (task / "stat").read_text() for task in Path(f"/proc/{self.pid}/task").iterdir()
        ):
            time.sleep(0.01)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)
