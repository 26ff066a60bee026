"""The updater's handle of its guardian: a process that outlives it and resumes what it left paused."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, replace

from headrace.config import EngineTarget, HostSettings

logger = logging.getLogger(__name__)
RECOVERY_S = 60.0
"""What the guardian process has for each engine."""
_END_S = 5.0


class Guardian:
    """The updater's handle of its guardian process; started once, before the first pause, and kept. Thread-safe.

    A guardian that has died is replaced when there is something to tell it.

    Args:
        host: Where the updater listens, and the guardian after it.
    """

    def __init__(self, host: HostSettings) -> None:
        self._host = replace(host, bind_port=0)
        self._process: subprocess.Popen[bytes] | None = None
        self._paused: dict[str, EngineTarget] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process, if there is none; returns before it is up (its pipe already holds what is told)."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()

    def paused(self, target: EngineTarget) -> None:
        """Say that this engine is about to be paused, and how it is reached."""
        with self._lock:
            self._paused[target.address] = target
            self._tell({"paused": asdict(target)})

    def resumed(self, target: EngineTarget) -> None:
        """Say that this engine needs no guardian any more (resumed, or paused for good reason)."""
        with self._lock:
            self._paused.pop(target.address, None)
            self._tell({"resumed": target.address})

    def close(self) -> None:
        """End the process; idempotent. Where an engine is still paused it is given the time to resume it."""
        with self._lock:
            process, self._process = self._process, None
            recovers = bool(self._paused)
        if process is not None:
            _end(process, recovers=recovers)

    def _start(self) -> None:
        if self._process is not None:
            _end(self._process, recovers=False)
        command = [sys.executable, "-P", "-m", "headrace.recovery"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._write({"host": self._host.plain()})
        for target in self._paused.values():
            self._write({"paused": asdict(target)})

    def _tell(self, message: dict[str, object]) -> None:
        if self._process is not None and not self._write(message) and self._paused:
            self._start()

    def _write(self, message: dict[str, object]) -> bool:
        """Return whether the process is there to read it."""
        if self._process is None or self._process.stdin is None:
            return False
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        return True


def _end(process: subprocess.Popen[bytes], *, recovers: bool) -> None:
    """Let the process go; one that recovers outlives this, as after an updater's death, where it takes too long."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    try:
        process.wait(RECOVERY_S if recovers else _END_S)
    except subprocess.TimeoutExpired:
        if recovers:
            logger.warning("the guardian still recovers engines that are paused, and is left behind")
            return
        process.kill()
        process.wait()
