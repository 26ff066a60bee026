"""Startup: whether a process that is starting is late, by its own time; what it stood in line for a core is not its."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import HeadraceError, PeerLostError, TransferTimeoutError

STARTUP_S = 60.0
LONGEST_STARTUP_S = 300.0
_MOSTLY = 0.5


@dataclass(frozen=True, slots=True)
class CoreTime:
    """What a process's first thread had of the cores so far, in seconds: running, and runnable without one."""

    ran_s: float = 0.0
    waited_s: float = 0.0

    @classmethod
    def of(cls, pid: int) -> CoreTime:
        """Read it; zeros where the process is gone or the kernel does not count (`/proc/PID/schedstat`)."""
        try:
            ran_ns, waited_ns, _ = Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()
        except (OSError, ValueError):
            return cls()
        return cls(int(ran_ns) / 1e9, int(waited_ns) / 1e9)


class Startup:
    """One process on its way up. Lives in the process that started it.

    Args:
        process: The process, just started.
        name: What it is, for messages.
    """

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self._process = process
        self._name = name
        self._begin = time.monotonic()

    def check(self) -> None:
        """Return while there is hope.

        Raises:
            PeerLostError: It ended.
            TransferTimeoutError: It is late, in its own time or at all; says so where others kept the cores from it.
        """
        if self._process.poll() not in (None, 0):
            text = f"{self._name} ended with code {self._process.returncode} before it was up; see its messages"
            raise PeerLostError(text, phase="read")
        elapsed_s = time.monotonic() - self._begin
        had = CoreTime.of(self._process.pid)
        if elapsed_s - had.waited_s > STARTUP_S or elapsed_s > LONGEST_STARTUP_S:
            raise self._late(elapsed_s, had)

    def _late(self, elapsed_s: float, had: CoreTime) -> HeadraceError:
        text = f"{self._name} did not dial in within {elapsed_s:.0f} s"
        if had.waited_s > _MOSTLY * elapsed_s:
            text += (
                f": it ran for {had.ran_s:.1f} s and stood in line for a core for {had.waited_s:.0f} s. Other "
                "processes keep this machine's cores busy: leave one core to the updater (taskset on the others), or "
                "start it in the engine's session, so that the kernel divides the cores by process"
            )
        return TransferTimeoutError(text, phase="read", retryable=True)
