"""The updater's handle of its guardian: a process that outlives it and resumes what it left paused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

from headrace.config import EngineTarget


class Guardian:
    """The updater's handle of its guardian process; started once, before the first pause, and kept."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, if there is none; returns before it is up (its pipe already holds what is told)."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-P", "-m", "headrace.recovery"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def paused(self, target: EngineTarget) -> None:
        """Say that this engine is about to be paused, and how it is reached."""
        self._tell({"paused": asdict(target)})

    def resumed(self, target: EngineTarget) -> None:
        """Say that this engine needs no guardian any more (resumed, or paused for good reason)."""
        self._tell({"resumed": target.address})

    def close(self) -> None:
        """End the process; idempotent."""
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _tell(self, message: dict[str, object]) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
