"""Keepers and joiners as real processes, and bare engines' weights known to the byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pytest
from p2p_hosts import Host

from headrace import wire
from headrace.errors import ConnectError
from headrace.server.invitation import Invitation
from headrace.server.membership import Membership
from headrace.testing.leaks import descendants
from headrace.transports.mooncake_engine import missing

START_S = 120.0


class Command:
    """One `headrace` command as a process. Use as a context: it is ended afterwards."""

    def __init__(
        self,
        *arguments: str | Path,
        program: Sequence[str] = (sys.executable, "-m", "headrace"),
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            [*prefix, *program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (environment or {}),
        )

    def end(self, timeout_s: float = START_S) -> tuple[int, str, str]:
        """Wait for its end; return its code and what it printed."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def read_until(self, word: str) -> str:
        """Return what follows `word` in the next line that begins with it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(f"{word} "):
                return line.split()[1]
        raise ConnectError(f"it ended without saying {word}: {self.end(1.0)[2]}")

    def signal_all(self, number: int) -> None:
        """Send a signal to it and to what it started."""
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """Ask it to end, then make it; idempotent."""
        if self.process.poll() is None:
            self.signal_all(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HoldProcess(Command):
    """`headrace hold`, holding when constructed.

    Attributes:
        metas: Its metas file.
        invitation: How to join.
    """

    def __init__(
        self,
        checkpoint: Path,
        metas: Path,
        *options: str | Path,
        program: Sequence[str] = (sys.executable, "-m", "headrace"),
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            "hold",
            "--checkpoint",
            checkpoint,
            "--save-metas",
            metas,
            *options,
            program=program,
            prefix=prefix,
            environment=environment,
        )
        self.metas = metas
        limit = time.monotonic() + START_S
        while not (metas.exists() and metas.read_text().endswith("}\n")):
            if self.process.poll() is not None or time.monotonic() > limit:
                self.process.kill()
                _, _, err = self.end()
                text = f"hold did not come up within {START_S:g} s: {err}"
                raise ConnectError(text)
            time.sleep(0.05)
        self.invitation = Invitation.load(metas)
        self.holders: list[str] = json.loads(metas.read_text())["holders"]

    def standing(self) -> wire.Standing:
        """Return what `status` shows."""
        with Membership(self.invitation, "test") as member:
            return member.standing()

    def standing_from(self, host: Host) -> wire.Standing:
        """Return what `status` shows on a host."""
        arguments = ["status", "--load-metas", self.metas, "--json"]
        with Command(*arguments, prefix=host.prefix, environment=host.environment) as status:
            code, out, err = status.end()
        assert code == 0, err
        return msgspec.json.decode(out, type=wire.Standing)

    def stop(self) -> None:
        """Let it hang, with Mooncake's process where it has one."""
        self.signal_all(signal.SIGSTOP)

    def kill(self) -> None:
        """End it without a word."""
        self.process.kill()
        self.process.wait(10)


def need_mooncake() -> None:
    """Skip the test where Mooncake cannot be loaded."""
    if reason := missing():
        pytest.skip(reason)


def join_arguments(target: str, metas: Path, *options: str) -> list[str]:
    """Return the arguments of a `headrace join`."""
    return ["join", "--to", target, "--load-metas", str(metas), "--json", *options]


def run_join(target: str, metas: Path, *options: str, timeout_s: float = START_S) -> dict[str, Any]:
    """Join and return the report."""
    with Command(*join_arguments(target, metas, *options)) as join:
        code, out, err = join.end(timeout_s)
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report
