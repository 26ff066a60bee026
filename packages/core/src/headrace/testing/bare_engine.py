"""BareEngine: real worker processes with a receiver each and no model loop; an engine for tests and benchmarks."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from multiprocessing.connection import Connection
from secrets import token_hex
from types import TracebackType
from typing import Any, Self

import torch

from headrace.errors import ConnectError, HeadraceError, PeerLostError, RemoteFailure, TransferTimeoutError
from headrace.protocols import InferenceBackend, Ticket
from headrace.receiver import Receiver
from headrace.testing.spawning import reference_of, resolve
from headrace.types import CacheMode, WorkerId

START_S = 120.0
BackendFactory = Callable[..., InferenceBackend]
"""Called in each worker as `factory(worker, world_size, *args)`."""


class BareEngine:
    """Starts workers, hands tickets to their receivers, calls functions in them, kills them.

    Use as a context. `control` is its EngineControl, in this process; `holding` likewise, and can hold.

    Args:
        factory: A module-level function; the worker finds it by its file.
        world_size: Number of workers.
        args: Further arguments of the factory; must be picklable.
        environment: Variables of the workers beside this process's own.
    """

    def __init__(
        self,
        factory: BackendFactory,
        world_size: int,
        *args: object,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.instance = token_hex(4)
        self.world_size = world_size
        self.control = BareControl(self)
        self.holding = HoldingBareControl(self)
        self.paused = False
        self.pauses = 0
        self.holds = 0
        context = multiprocessing.get_context("spawn")
        self._enrolling = threading.Lock()
        self._locks = [threading.Lock() for _ in range(world_size)]
        self._ends: list[Connection] = []
        self._processes = []
        saved = dict(os.environ)
        os.environ |= {"OMP_NUM_THREADS": "1"} | (environment or {})
        try:
            for rank in range(world_size):
                here, there = context.Pipe()
                spec = (reference_of(factory), WorkerId(self.instance, rank), world_size, args)
                process = context.Process(target=_serve, args=(there, spec), daemon=True)
                process.start()
                there.close()
                self._ends.append(here)
                self._processes.append(process)
        finally:
            os.environ.clear()
            os.environ |= saved
        for rank in range(world_size):
            self._take(rank, START_S)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid or 0 for process in self._processes]

    def enrol(self, ticket: Ticket) -> None:
        """Hand a ticket to every worker's receiver; all workers get tickets in the same order."""
        with self._enrolling:
            for rank in range(self.world_size):
                self._ask(rank, ("enrol", ticket))

    def hold(self, update_id: str, deadline_s: float) -> list[int | None]:
        """Have every worker stand still in its main thread, all from the same command on; return what each took."""
        with ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock)
            for end in self._ends:
                end.send(("call", reference_of(_stand), (update_id, deadline_s)))
            futures = [self._answer(rank, deadline_s + START_S) for rank in range(self.world_size)]
        return [future.result() for future in futures]

    def _answer(self, rank: int, deadline_s: float) -> Future[Any]:
        """Take a worker's answer, or how it failed: those of the others are taken too."""
        future: Future[Any] = Future()
        try:
            future.set_result(self._take(rank, deadline_s))
        except HeadraceError as error:
            future.set_exception(error)
        return future

    def call(self, rank: int, function: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401 - what it returns
        """Run a module-level `function(backend, receiver, *args)` in a worker's main thread and return its result."""
        return self._ask(rank, ("call", reference_of(function), args))

    def call_all(self, function: Callable[..., Any], *args: object) -> list[Any]:
        """Run `call` on every rank at the same time."""
        for rank in range(self.world_size):
            self._ends[rank].send(("call", reference_of(function), args))
        return [self._take(rank, START_S) for rank in range(self.world_size)]

    def kill(self, rank: int) -> None:
        """SIGKILL one worker and wait for its end."""
        self._processes[rank].kill()
        self._processes[rank].join(10)

    def close(self) -> None:
        """End all workers; idempotent."""
        for process, end in zip(self._processes, self._ends, strict=True):
            if process.is_alive():
                try:
                    end.send(("exit",))
                except OSError:
                    process.kill()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, rank: int, command: tuple[object, ...], deadline_s: float = START_S) -> Any:  # noqa: ANN401
        with self._locks[rank]:
            try:
                self._ends[rank].send(command)
            except OSError as error:
                message = f"worker {rank} is dead"
                raise ConnectError(message, rank=rank) from error
            return self._take(rank, deadline_s)

    def _take(self, rank: int, deadline_s: float) -> Any:  # noqa: ANN401
        try:
            if not self._ends[rank].poll(deadline_s):
                message = f"worker {rank} did not answer within {deadline_s:.0f} s"
                raise TransferTimeoutError(message, rank=rank)
            kind, value = self._ends[rank].recv()
        except (EOFError, ConnectionError) as error:
            message = f"worker {rank} died"
            raise PeerLostError(message, rank=rank) from error
        if kind == "failed":
            raise value.to_error()
        return value


class BareControl:
    """EngineControl of a BareEngine; pause and resume only count, as nothing runs."""

    def __init__(self, engine: BareEngine) -> None:
        self._engine = engine

    @property
    def address(self) -> str:
        """A name for messages."""
        return f"bare engine {self._engine.instance}"

    def wait_ready(self, deadline_s: float) -> None:
        """Return at once: workers are ready when the engine is constructed."""

    def expected_receivers(self, deadline_s: float) -> int:  # noqa: ARG002 - the contract's signature
        """Return the number of workers."""
        return self._engine.world_size

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:  # noqa: ARG002
        """Hand the ticket to every worker."""
        self._engine.enrol(ticket)

    def pause(self, cache: CacheMode, deadline_s: float) -> None:  # noqa: ARG002
        """Note the pause."""
        self._engine.paused = True
        self._engine.pauses += 1

    def confirm(self, version: int, deadline_s: float) -> None:
        """Do nothing: the workers report the version."""

    def resume(self, deadline_s: float) -> None:  # noqa: ARG002
        """Note the end of the pause."""
        self._engine.paused = False

    def served_version(self, deadline_s: float) -> int | None:  # noqa: ARG002
        """Return the version that all workers report."""
        versions = {self._engine.call(rank, served_version) for rank in range(self._engine.world_size)}
        return versions.pop() if len(versions) == 1 else None

    def close(self) -> None:
        """Nothing to release."""


class HoldingBareControl(BareControl):
    """HoldingControl of a BareEngine: its workers stand still in the thread that obeys commands."""

    def hold_obstacle(self, deadline_s: float) -> str | None:  # noqa: ARG002 - the contract's signature
        """Return None: a bare engine can always be held."""
        return None

    def hold(self, update_id: str, deadline_s: float) -> None:
        """Hold all workers; returns when they have gone on."""
        self._engine.holds += 1
        self._engine.hold(update_id, deadline_s)


def served_version(_backend: InferenceBackend, receiver: Any) -> int | None:  # noqa: ANN401 - a Receiver
    """Return what a worker's receiver says it serves; for `BareEngine.call`."""
    version: int | None = receiver.served_version
    return version


def _stand(_backend: InferenceBackend, receiver: Any, update_id: str, deadline_s: float) -> int | None:  # noqa: ANN401
    """Stand still in a worker until its receiver lets go."""
    taken: int | None = receiver.hold(update_id, deadline_s)
    return taken


def weights_state(_backend: InferenceBackend, receiver: Any) -> str:  # noqa: ANN401 - a Receiver
    """Return what a worker's receiver says its live tensors are; for `BareEngine.call`."""
    return str(receiver.weights_state)


def _serve(end: Connection, spec: tuple[Any, ...]) -> None:
    """Be a worker: make the backend and its receiver, obey until told to leave or the engine is gone."""
    logging.basicConfig(level=os.environ.get("HEADRACE_LOG", "ERROR"))
    torch.set_num_threads(1)
    reference, worker, world_size, args = spec
    try:
        backend = resolve(reference)(worker, world_size, *args)
        receiver = Receiver(backend)
        end.send(("ok", None))
        while (command := end.recv())[0] != "exit":
            end.send(_obey(command, backend, receiver))
        receiver.close()
    except (EOFError, ConnectionError):
        os._exit(1)
    except HeadraceError as error:
        end.send(("failed", RemoteFailure.of(error)))
    os._exit(0)


def _obey(command: tuple[Any, ...], backend: InferenceBackend, receiver: Any) -> tuple[str, Any]:  # noqa: ANN401
    try:
        if command[0] == "enrol":
            return ("ok", receiver.enrol(command[1]))
        return ("ok", resolve(command[1])(backend, receiver, *command[2]))
    except Exception as error:  # noqa: BLE001 - the rank boundary
        return ("failed", RemoteFailure.of(error))
