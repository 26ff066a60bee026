"""Calls into an engine of this process, which has no deadlines of its own; and versions as engines spell them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import wait
from typing import Any, TypeVar

from headrace.errors import ConfigError, HeadraceError, RemoteProtocolError, TransferTimeoutError

T = TypeVar("T")


def call_within(address: str, deadline_s: float, call: Callable[[], T]) -> T:
    """Run a blocking call in a thread and return what it returns.

    Raises:
        TransferTimeoutError: It did not return within the deadline; it goes on in its thread.
        HeadraceError: What it raised; errors of the engine become `RemoteProtocolError`.
    """
    done: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(call())
        except Exception as error:  # noqa: BLE001 - carried to the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, name="headrace-engine-call", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if failed:
        raise _refused(address, failed[0]) from failed[0]
    if not done:
        raise _late(address, deadline_s)
    return done[0]


def await_within(
    address: str, deadline_s: float, call: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop
) -> T:
    """Run a coroutine of the engine in its own event loop, from a thread that is not the loop's.

    A loop that stands still between the engine's calls is run by the calling thread.

    Raises:
        ConfigError: It was called in the loop's own thread, which would wait for itself.
        TransferTimeoutError: It did not end within the deadline, and was cancelled.
        HeadraceError: What it raised; errors of the engine, its own timeouts too, become `RemoteProtocolError`.
    """
    try:
        check_thread(address, loop)
    except ConfigError:
        call.close()
        raise
    try:
        if loop.is_running():
            return _awaited_elsewhere(address, deadline_s, call, loop)
        return loop.run_until_complete(_awaited_here(address, deadline_s, call))
    except HeadraceError:
        raise
    except Exception as error:
        raise _refused(address, error) from error


def _awaited_elsewhere(
    address: str, deadline_s: float, call: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop
) -> T:
    future = asyncio.run_coroutine_threadsafe(call, loop)
    try:
        if not wait([future], deadline_s).done:
            raise _late(address, deadline_s)
        return future.result()
    finally:
        future.cancel()


async def _awaited_here(address: str, deadline_s: float, call: Coroutine[Any, Any, T]) -> T:
    limit = asyncio.timeout(deadline_s)
    try:
        async with limit:
            return await call
    except TimeoutError as error:
        if limit.expired():
            raise _late(address, deadline_s) from error
        raise


def check_thread(address: str, loop: asyncio.AbstractEventLoop) -> None:
    """Do nothing where this thread can wait for what runs in the engine's event loop.

    Raises:
        ConfigError: It is the loop's own, which would wait for itself.
    """
    if _runs_here(loop):
        message = (
            f"{address} serves in the event loop that this call would block; call from another thread: "
            "await asyncio.to_thread(server.update, control)"
        )
        raise ConfigError(message, name="loop")


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def running_loop(engine: str) -> asyncio.AbstractEventLoop:
    """Return the event loop that this code runs in.

    Raises:
        ConfigError: There is none.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        message = f"attach {engine} inside its event loop, or give the loop"
        raise ConfigError(message, name="loop") from None


def version_number(version: object) -> int | None:
    """Return a version that an update set, or None for what an engine says before the first."""
    return int(version) if isinstance(version, str) and version.isdecimal() else None


def _late(address: str, deadline_s: float) -> TransferTimeoutError:
    message = f"{address} did not answer within {deadline_s:g} s; is its event loop running?"
    return TransferTimeoutError(message, name=address, retryable=True)


def _refused(address: str, error: Exception) -> HeadraceError:
    if isinstance(error, HeadraceError):
        return error
    return RemoteProtocolError(f"{address}: {type(error).__name__}: {error}", name=address)
