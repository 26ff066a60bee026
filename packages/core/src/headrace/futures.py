"""Waits for futures of which some may have been cancelled."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def wait_ended(
    futures: Iterable[Future[T]], timeout_s: float | None = None, *, first_failure: bool = False
) -> set[Future[T]]:
    """Wait until all have ended, or with `first_failure` one has failed; returns those that have not ended. Blocking.

    What is cancelled before it begins has ended. `concurrent.futures.wait` holds it for under way until a worker comes
    to it, which one of a pool that was shut down never does.
    """
    waited = set(futures)
    over, ends = threading.Event(), itertools.count(1)

    def end(future: Future[T]) -> None:
        failed = first_failure and not future.cancelled() and future.exception() is not None
        if next(ends) == len(waited) or failed:
            over.set()

    for future in waited:
        future.add_done_callback(end)
    if waited:
        over.wait(timeout_s)
    return {future for future in waited if not future.done()}
