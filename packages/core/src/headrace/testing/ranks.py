"""run_ranks: a function on every rank of a little world of processes, with one deadline for all."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from headrace.errors import HeadraceError
from headrace.testing.spawning import Reference, reference_of, resolve

_GRACE_S = 2.0


class RankError(HeadraceError):
    """A rank raised, died or was late; `traceback` is the rank's own, empty where it could not speak."""

    def __init__(self, message: str, rank: int, remote_traceback: str = "") -> None:
        super().__init__(message, rank=rank)
        self.traceback = remote_traceback


def run_ranks(function: Callable[..., Any], world_size: int, timeout_s: float, *args: object) -> list[Any]:
    """Run `function(rank, world_size, *args)` in `world_size` new processes and return what they returned, by rank.

    Blocking. The first rank that fails ends all others; no process outlives the call. This process touches no device.

    Args:
        function: A module-level function; found by its file, so a test's own will do.
        world_size: Number of processes.
        timeout_s: Limit for everything, the processes' start included.
        args: Further arguments; picklable, as the results must be.

    Raises:
        RankError: A rank raised (its traceback is in the message), died, or had not returned at the deadline.
    """
    context = multiprocessing.get_context("spawn")
    limit = time.monotonic() + timeout_s
    processes, ends = [], []
    try:
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_be_rank, args=(there, reference_of(function), rank, world_size, args), daemon=True
            )
            process.start()
            there.close()
            processes.append(process)
            ends.append(here)
        return _collect(ends, limit, timeout_s)
    finally:
        for process in processes:
            process.join(_GRACE_S if sys.exc_info()[0] is None else 0.0)
            process.kill()
            process.join()
            process.close()
        for end in ends:
            end.close()


def _collect(ends: Sequence[Connection], limit: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        waiting = {end: rank for rank, end in enumerate(ends) if rank not in results}
        ready = wait(list(waiting), max(0.0, limit - time.monotonic()))
        if not ready:
            late = sorted(waiting.values())
            message = f"ranks {late} had not returned after {timeout_s:g} s and were killed"
            raise RankError(message, late[0])
        for end, rank in waiting.items():
            if end in ready:
                results[rank] = _take(end, rank)
    return [results[rank] for rank in range(len(ends))]


def _take(end: Connection, rank: int) -> Any:  # noqa: ANN401 - what the function returned
    try:
        kind, value = end.recv()
    except (EOFError, ConnectionError):
        message = f"rank {rank} died without a word"
        raise RankError(message, rank) from None
    if kind == "failed":
        message = f"rank {rank} failed:\n{value}"
        raise RankError(message, rank, value)
    return value


def _be_rank(end: Connection, reference: Reference, rank: int, world_size: int, args: tuple[Any, ...]) -> None:
    """Leave by `_exit`: the interpreter's own exit can abort in gloo's threads."""
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        end.send(("ok", resolve(reference)(rank, world_size, *args)))
    except BaseException:  # noqa: BLE001 - the rank boundary: the parent must hear of every end
        end.send(("failed", traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
