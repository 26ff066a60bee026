"""ServerProcess: a real server of any engine in a process of its own, ready when it is wanted and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from headrace.errors import ConnectError

START_S = 120.0
_STOP_S = 20.0
_ANSWER_S = 60.0
_LOG_BYTES = 4000


class ServerProcess:
    """A server that answers `/health` when it is ready. Use as a context.

    Args:
        command: What to run.
        port: Where it will listen, on this host.
        environment: All its variables.
        log: File that takes what it writes; None lets its errors through to the terminal.
        headers: Sent with every request.
        own_group: Whether it is the head of a process group: `kill` and `close` then end its children too. It is no
            session of its own, as Linux divides the cores among sessions first (autogroup), and in such a division
            a server whose workers spin has been seen to leave 3 % of a core to the process that updates it.

    Attributes:
        url: Its base URL.
        process: Its first process.
        client: Asks it.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        *,
        environment: Mapping[str, str],
        log: Path | None = None,
        headers: Mapping[str, str] | None = None,
        own_group: bool = False,
    ) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._own_group = own_group
        with log.open("wb") if log else contextlib.nullcontext(subprocess.DEVNULL) as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if log else None,
                env=environment,
                process_group=0 if own_group else None,
            )
        self.client = httpx.Client(base_url=self.url, timeout=_ANSWER_S, trust_env=False, headers=headers)

    def wait_ready(self, deadline_s: float = START_S) -> None:
        """Wait until it answers requests.

        Raises:
            ConnectError: It ended, or is not ready within the deadline; holds the end of its log.
        """
        limit = time.monotonic() + deadline_s
        while not self.is_ready():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > limit:
                self.close()
                what = f"was not ready within {deadline_s:g} s" if ended is None else f"left with exit code {ended}"
                raise self._broken(what)
            time.sleep(0.05)

    def is_ready(self) -> bool:
        """Return whether it says that it is healthy."""
        try:
            return self.client.get("/health").is_success
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """SIGKILL it, and what else is in its group."""
        self._kill_all()
        self.process.wait(_STOP_S)

    def close(self) -> None:
        """End it; idempotent."""
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._kill_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _kill_all(self) -> None:
        if not self._own_group:
            self.process.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _broken(self, what: str) -> ConnectError:
        tail = self._log.read_text(errors="replace")[-_LOG_BYTES:] if self._log else ""
        ending = f"; its log ends with:\n{tail}" if tail else ""
        return ConnectError(f"the engine at {self.url} {what}{ending}", name=self.url)
