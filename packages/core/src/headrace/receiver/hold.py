"""Hold: a worker stands still inside one call while its weights are exchanged, and who may let it go on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from headrace.errors import ApplyError, TransferTimeoutError, WeightsState

if TYPE_CHECKING:
    import torch

    from headrace.receiver.devices import WorkerDevice
    from headrace.receiver.receiver import Receiver

logger = logging.getLogger(__name__)
ALIVE_S = 0.05
GRACE_S = 5.0
EXIT_CODE = 70


class Hold:
    """One update's hold of this worker, where the worker's own thread and the session's meet.

    Before the vote anybody may end it: the weights are old. From the vote on, in an instance of several ranks, only
    the coordinator's word does, as only it knows what the others hold. A rank that is left alone then ends its
    process, and so does one whose weights are mixed: dead rather than a mixture. A single rank whose weights are whole,
    old or new, goes on with them.

    Worker's thread: `stand`. Session's thread: `wait_stood`, `vote`, `standing`, then `finish`, `abort` or `abandon`.

    Args:
        receiver: Whose weights are exchanged.
        update_id: The update, for messages.
        adopt: Makes what was committed the version that is served, and returns it.
    """

    def __init__(self, receiver: Receiver, update_id: str, adopt: Callable[[], int]) -> None:
        self.version: int | None = None
        self._receiver = receiver
        self._device: WorkerDevice = receiver.device
        self._update_id = update_id
        self._adopt = adopt
        self._world_size = receiver.backend.identity().world_size
        self._lock = threading.RLock()
        self._stood = threading.Event()
        self._over = threading.Event()
        self._voted = False
        self._begin_s = 0.0
        self._mark: torch.cuda.Event | None = None

    def stand(self, deadline_s: float) -> int | None:
        """Stand still until the hold is over; returns the version that was taken, None where none was.

        What the caller's stream was given before is done before the first live byte changes, and what it is given
        afterwards comes after the last.
        """
        if not self._over.is_set():
            self._begin_s, self._mark = time.monotonic(), self._device.mark()
            self._stood.set()
            if not self._over.wait(deadline_s):
                self._expire(deadline_s)
            self._device.join()
        return self.version

    def wait_stood(self, deadline_s: float, alive: Callable[[], None]) -> None:
        """Wait until the worker stands.

        Args:
            deadline_s: Limit.
            alive: Called now and then; may raise to break the wait off.

        Raises:
            TransferTimeoutError: It does not within the deadline.
        """
        limit = time.monotonic() + deadline_s
        while not self._stood.wait(ALIVE_S):
            alive()
            if time.monotonic() >= limit:
                message = f"the worker did not stand still within {deadline_s:g} s; is its forward step that long?"
                raise TransferTimeoutError(message, phase="prepare", retryable=True)

    def vote(self) -> None:
        """Promise to stand until the coordinator's word.

        Raises:
            ApplyError: The worker has gone on.
        """
        with self._lock:
            self._check()
            self._voted = True

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Keep a worker that has voted where it is while the body runs; nothing where nobody is held.

        Raises:
            ApplyError: It has gone on.
        """
        if not self._voted:
            yield
            return
        with self._lock:
            self._check()
            self._device.follow(self._mark)
            yield

    def finish(self, version: int) -> float:
        """Let the worker go on with the version that all ranks hold; returns how many seconds it stood."""
        return self._release(version)

    def abort(self, reason: str) -> WeightsState:
        """Let the worker go on, on the coordinator's word that the update is over; returns what it goes on with.

        A rank with new weights goes on with them only where it is the only one: others may hold old ones.
        """
        with self._lock:
            state = self._receiver.weights_state
            if self._over.is_set():
                return state
            if not self._voted or state == "old":
                self._release(None)
            elif state == "new" and self._world_size == 1:
                self._go_on_new()
            else:
                self._end(f"the update was given up ({reason})")
            return state

    def abandon(self, reason: str) -> None:
        """Let the worker go on without the coordinator, where that is safe, else end this process; idempotent."""
        with self._lock:
            if self._over.is_set():
                return
            state = self._receiver.weights_state
            if not self._voted or (self._world_size == 1 and state == "old"):
                self._release(None)
            elif self._world_size == 1 and state == "new":
                self._go_on_new()
            else:
                self._end(reason)

    def _expire(self, deadline_s: float) -> None:
        """Decide on the worker's thread; a commit that is under way even now cannot be trusted to end."""
        if not self._lock.acquire(timeout=GRACE_S):
            self._end(f"its commit hangs after {deadline_s:g} s")
        try:
            self.abandon(f"nobody let go within {deadline_s:g} s")
        finally:
            self._lock.release()

    def _go_on_new(self) -> None:
        try:
            version = self._adopt()
        except Exception as error:  # noqa: BLE001 - the engine's, which has nobody left to hear of it
            self._end(f"its engine does not take the new version: {type(error).__name__}: {error}")
        self._release(version)

    def _release(self, version: int | None) -> float:
        self.version = version
        seconds = time.monotonic() - self._begin_s if self._stood.is_set() else 0.0
        self._over.set()
        return seconds

    def _check(self) -> None:
        if self._over.is_set():
            raise ApplyError("the worker is not held any more", phase="commit", retryable=True)

    def _end(self, why: str) -> NoReturn:
        logger.critical(
            "update %s: %s. This worker was held with its weights %s, as one of %d ranks whose weights may differ: "
            "its process ends now, as no answer may come from a mixture; restart the engine",
            self._update_id, why, self._receiver.weights_state, self._world_size,
        )  # fmt: skip
        logging.shutdown()
        os._exit(EXIT_CODE)
