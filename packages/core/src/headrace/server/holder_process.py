"""HolderProcess: a process that will hold, started before it is known what; imports no torch, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

from headrace.server.startup import Startup


class HolderProcess:
    """A process of `headrace.holder`; it loads what it needs at once, and then waits to be told what to hold.

    Lives in the process that started it, and ends with it. Ctrl-C in a terminal does not reach it: its owner decides.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-m", "headrace.holder"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
        self._startup: Startup | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def hold(self, spec: Mapping[str, object], name: str) -> None:
        """Tell it once what it is; it dials in some time after. One that has ended is `check`'s to tell.

        Args:
            spec: Its ticket and its part of a source.
            name: What it is, for messages.
        """
        self._startup = Startup(self._process, name)
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(spec).encode() + b"\n")
                self._process.stdin.flush()

    def check(self) -> None:
        """Return while it is on its way.

        Raises:
            PeerLostError: It ended.
            TransferTimeoutError: It is late.
        """
        if self._startup is not None:
            self._startup.check()

    def end(self, limit: float = 0.0) -> None:
        """Wait for its end until `limit` on the monotonic clock, then kill it; idempotent."""
        try:
            self._process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


@contextmanager
def started(count: int) -> Iterator[list[HolderProcess]]:
    """Yield processes for a pool of holders to begin with; they end with the body, whether it took them or not."""
    processes: list[HolderProcess] = []
    with ExitStack() as stack:
        for _ in range(count):
            processes.append(HolderProcess())
            stack.callback(processes[-1].end)
        yield processes
