"""The front's side of the workers: starting them, one command to all, noticing the first that dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from headrace.embedded.messages import Command, Exit, Failed, Ready, Reply, Startup, decode_reply, encode
from headrace.errors import (
    HeadraceError,
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    TransferTimeoutError,
)

if TYPE_CHECKING:
    from headrace.embedded.settings import EngineSettings

AnyReply = TypeVar("AnyReply", bound=Reply)


class Fleet:
    """All workers of one engine. Commands are serialised; every rank gets the same ones in the same order."""

    def __init__(
        self, settings: EngineSettings, instance: str, on_loss: Callable[[HeadraceError], None]
    ) -> None:
        """Prepare; nothing runs until `start`.

        Args:
            settings: The engine's settings.
            instance: Instance id that the workers enrol under.
            on_loss: Called once, from any thread, when a worker ends that was not told to.
        """
        self._settings = settings
        self._instance = instance
        self._on_loss = on_loss
        self._processes: list[subprocess.Popen[bytes]] = []
        self._fronts: list[Connection] = []
        self._command = threading.Lock()
        self._state = threading.Lock()
        self._loss: HeadraceError | None = None
        self._leaving = False
        self._is_ready = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._processes]

    def start(self) -> None:
        """Start all worker processes; returns before they have loaded anything."""
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-engine-", ignore_cleanup_errors=True)
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        for rank in range(self._settings.tp):
            self._spawn(rank, rendezvous)
        for rank, process in enumerate(self._processes):
            threading.Thread(
                target=self._watch, args=(rank, process), daemon=True, name=f"watch-{rank}"
            ).start()

    def wait_ready(self) -> Ready:
        """Wait until every worker has loaded its part.

        Raises:
            HeadraceError: A worker failed; the others are ended.
        """
        with self._command:
            found = self._collect(Ready, self._settings.start_s, "start")[0]
            self._is_ready = True
            return found

    def call(self, command: Command, kind: type[AnyReply], deadline_s: float) -> list[AnyReply]:
        """Send a command to every worker and return their replies by rank. Blocking.

        Raises:
            HeadraceError: The command failed on a rank, or a worker is lost.
        """
        what = type(command).__name__.lower()
        if not self._command.acquire(timeout=deadline_s):
            message = f"{what}: the workers are busy with another command for {deadline_s:g} s"
            raise TransferTimeoutError(message, retryable=True)
        try:
            self._check()
            self._send(encode(command))
            return self._collect(kind, deadline_s, what)
        finally:
            self._command.release()

    def stop(self, deadline_s: float = 10.0) -> None:
        """Tell the workers to leave and end those that have not within the deadline, or still load; idempotent."""
        end = time.monotonic() + deadline_s
        with self._state:
            self._leaving = True
        if not self._is_ready:
            for process in self._processes:
                process.kill()
        elif self._command.acquire(timeout=deadline_s / 2):
            for front in self._fronts:
                with contextlib.suppress(OSError, ValueError):
                    front.send_bytes(encode(Exit()))
            self._command.release()
        for process in self._processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for front in self._fronts:
            front.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _spawn(self, rank: int, rendezvous: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "headrace.embedded.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=self._environment(),
                process_group=0,  # Ctrl-C in a terminal goes to the front's group, and the front decides
            )
        front = Connection(ours.detach())
        front.send_bytes(encode(self._startup(rank, rendezvous)))
        self._processes.append(process)
        self._fronts.append(front)

    def _environment(self) -> dict[str, str]:
        loopback = {} if self._settings.device == "cuda" else {"GLOO_SOCKET_IFNAME": "lo"}
        return (
            loopback
            | os.environ
            | {
                "OMP_NUM_THREADS": str(self._settings.num_threads),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            }
        )

    def _startup(self, rank: int, rendezvous: str) -> Startup:
        settings = self._settings
        return Startup(
            instance=self._instance,
            rank=rank,
            world_size=settings.tp,
            model=str(settings.model),
            device=settings.device,
            dtype=settings.dtype,
            load_format=settings.load_format,
            rendezvous=rendezvous,
            start_s=settings.start_s,
        )

    def _send(self, message: bytes) -> None:
        for rank, front in enumerate(self._fronts):
            try:
                front.send_bytes(message)
            except (OSError, ValueError):
                raise self._lost(rank) from None

    def _collect(self, kind: type[AnyReply], deadline_s: float, what: str) -> list[AnyReply]:
        """Read one reply from each worker in the order they come."""
        end = time.monotonic() + deadline_s
        replies: dict[int, Reply] = {}
        while len(replies) < len(self._fronts):
            waiting = {front: rank for rank, front in enumerate(self._fronts) if rank not in replies}
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                raise self._lose(_late(what, deadline_s, sorted(waiting.values())))
            for front in ready:
                rank = waiting[front]  # type: ignore[index]
                replies[rank] = self._receive(rank, what)
        return [self._checked(replies[rank], kind) for rank in range(len(self._fronts))]

    def _receive(self, rank: int, what: str) -> Reply:
        try:
            reply: Reply = decode_reply(self._fronts[rank].recv_bytes())
        except (EOFError, OSError):
            raise self._lost(rank) from None
        if isinstance(reply, Failed) and what in _COLLECTIVE:
            raise self._lose(reply.to_error())
        return reply

    def _checked(self, reply: Reply, kind: type[AnyReply]) -> AnyReply:
        if isinstance(reply, Failed):
            raise reply.to_error()
        if not isinstance(reply, kind):
            raise RemoteProtocolError(
                f"a worker replied {type(reply).__name__} where {kind.__name__} was due"
            )
        return reply

    def _check(self) -> None:
        with self._state:
            if self._loss is not None:
                raise self._loss
            if self._leaving or not self._fronts:
                raise LocalProtocolError("the engine's workers are not running; start a new engine")

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        with self._state:
            if self._leaving:
                return
        self._lost(rank)

    def _lost(self, rank: int) -> HeadraceError:
        """Note that a worker's process or connection is gone, and return the error that says how."""
        process = self._processes[rank]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        message = (
            f"worker {rank} (pid {process.pid}) {_how_it_ended(process.returncode)}; start the engine again"
        )
        return self._lose(PeerLostError(message, rank=rank))

    def _lose(self, error: HeadraceError) -> HeadraceError:
        """Give the engine up for `error` or, if there was one, the first reason; end all workers."""
        if not isinstance(error, PeerLostError) and (rank := self._dead_rank()) is not None:
            return self._lost(rank)  # what the others say is only the consequence
        with self._state:
            first = self._loss is None and not self._leaving
            self._loss = self._loss or error
            loss = self._loss
        if first:
            for process in self._processes:
                process.kill()
            self._on_loss(loss)
        return loss

    def _dead_rank(self) -> int | None:
        """Return a rank whose process has ended, waiting a moment for one that is about to."""
        end = time.monotonic() + _MOMENT_S
        while time.monotonic() < end:
            for rank, process in enumerate(self._processes):
                if process.poll() is not None:
                    return rank
            time.sleep(0.01)
        return None


_COLLECTIVE = ("start", "step")
"""What the ranks do together: after a failure of one, the others cannot be talked to any more."""

_MOMENT_S = 0.3


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"left with exit code {code}"


def _late(what: str, deadline_s: float, ranks: list[int]) -> TransferTimeoutError:
    names = ", ".join(map(str, ranks))
    return TransferTimeoutError(
        f"{what}: no answer from worker {names} within {deadline_s:g} s; the engine is given up"
    )
