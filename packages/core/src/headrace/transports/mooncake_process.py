"""Helper processes that load Mooncake: requests and answers over pipes, and their end with their parent."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import msgspec

from headrace.errors import ConnectError, HeadraceError, PeerLostError, RemoteFailure, TransferTimeoutError
from headrace.transports.mooncake_engine import helper_environment, require_mooncake

logger = logging.getLogger(__name__)
START_S = 60.0
_LENGTH = struct.Struct("<I")
_NICE = 5
_THREADS = 16
Answer = dict[str, Any]
Handler = Callable[[Mapping[str, Any]], Answer]


class HelperProcess:
    """The parent's end of a helper: calls that may be made from several threads at once.

    Args:
        module: What `python -m` runs; its `main` calls `serve`.
        settings: First message, answered when the helper is ready.
        cpus: CPUs that the helper may use, to keep it off those of an engine; None leaves it as it is.
        pass_fds: Descriptors that it inherits.

    Raises:
        BackendUnavailableError: Mooncake cannot be loaded or started.
        TransferTimeoutError: The helper did not come up.
    """

    def __init__(
        self,
        module: str,
        settings: Mapping[str, object],
        *,
        cpus: frozenset[int] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        require_mooncake()
        quiet = not logger.isEnabledFor(logging.DEBUG)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            env=helper_environment(os.environ),
            pass_fds=tuple(pass_fds),
        )
        self.pid = self._process.pid
        if cpus:
            os.sched_setaffinity(self.pid, cpus)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[Answer]] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="headrace-mooncake", daemon=True)
        self._thread.start()
        try:
            self.ready = self.call(settings, START_S)
        except BaseException:
            self.close()
            raise

    def submit(self, request: Mapping[str, object]) -> Future[Answer]:
        """Send a request; the future has the answer, or the helper's error.

        Raises:
            PeerLostError: The helper ended.
        """
        future: Future[Answer] = Future()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = future
            try:
                write_frame(self._pipe(self._process.stdin), {"id": number, **request})
            except (OSError, ValueError) as error:
                self._waiting.pop(number, None)
                raise _ended() from error
        return future

    def call(self, request: Mapping[str, object], deadline_s: float) -> Answer:
        """Send a request and wait for its answer.

        Raises:
            TransferTimeoutError: No answer within the deadline; the helper may still be at it.
            PeerLostError: The helper ended.
        """
        try:
            return self.submit(request).result(max(deadline_s, 0.0))
        except TimeoutError:
            text = f"Mooncake's helper did not answer within {deadline_s:g} s"
            raise TransferTimeoutError(text, name="mooncake", retryable=True) from None

    @property
    def alive(self) -> bool:
        """Whether the helper runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the helper at once: what it had under way never lands. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._thread.join(START_S)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                self._pipe(pipe).close()

    @staticmethod
    def _pipe(pipe: object) -> BinaryIO:
        if pipe is None:
            raise _ended()
        return pipe  # type: ignore[return-value]

    def _listen(self) -> None:
        pipe = self._pipe(self._process.stdout)
        while (answer := read_frame(pipe)) is not None:
            with self._lock:
                future = self._waiting.pop(int(answer["id"]), None)
            if future is None:
                continue
            if "failure" in answer:
                future.set_exception(msgspec.convert(answer["failure"], RemoteFailure).to_error())
            else:
                future.set_result(answer)
        with self._lock:
            left, self._waiting = list(self._waiting.values()), {}
        for future in left:
            future.set_exception(_ended())


def _ended() -> PeerLostError:
    return PeerLostError("Mooncake's helper process ended; see its messages at level DEBUG", name="mooncake")


def serve(start: Callable[[Mapping[str, Any]], Handler]) -> None:
    """Run a helper: `start` takes the first message and returns what answers the others, in threads. To stdin's end."""
    os.nice(_NICE)
    source, sink, lock = sys.stdin.buffer, os.fdopen(os.dup(1), "wb"), threading.Lock()
    os.dup2(2, 1)  # what the library prints must not come between frames

    def answer(request: Mapping[str, Any], handler: Handler) -> None:
        try:
            found = handler(request)
        except HeadraceError as error:
            found = {"failure": msgspec.to_builtins(RemoteFailure.of(error))}
        except Exception as error:  # noqa: BLE001 - the process boundary
            found = {
                "failure": msgspec.to_builtins(
                    RemoteFailure.of(ConnectError(f"Mooncake's helper: {error!r}"))
                )
            }
        with lock:
            write_frame(sink, {"id": request["id"], **found})

    first = read_frame(source)
    if first is not None:
        made: list[Handler] = []

        def begin(settings: Mapping[str, Any]) -> Answer:
            made.append(start(settings))
            return dict(getattr(made[0], "facts", {}))

        answer(first, begin)
        with ThreadPoolExecutor(_THREADS, "headrace-mooncake") as pool:
            while made and (request := read_frame(source)) is not None:
                pool.submit(answer, request, made[0])
            os._exit(0)  # transfers under way end here and now


def read_frame(pipe: BinaryIO) -> dict[str, Any] | None:
    """Return the next message, or None at the end."""
    try:
        head = pipe.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        body = pipe.read(_LENGTH.unpack(head)[0])
    except (OSError, ValueError):
        return None
    decoded: dict[str, Any] = msgspec.msgpack.decode(body)
    return decoded


def write_frame(pipe: BinaryIO, message: Mapping[str, object]) -> None:
    """Send one message."""
    body = msgspec.msgpack.encode(message)
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()
