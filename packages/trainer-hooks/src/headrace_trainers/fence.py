"""StepFence: keeps an optimizer from changing weights that are being read, and readers from reading half a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from headrace.errors import StepMissedError, TransferTimeoutError


class StepFence:
    """Counts this rank's steps; the weights of one stay as they are while anybody reads them.

    The training thread calls `begin_write` before weights change and `end_write` after; a reader's thread opens
    `reading`. A reader never makes training wait for longer than `begin_write`'s deadline: then it is told that what it
    read is worth nothing.

    Args:
        step: Number of the step that the weights are of.

    Attributes:
        held_s: Seconds that training has waited for readers, so far.
    """

    def __init__(self, step: int = 0) -> None:
        self.held_s = 0.0
        self._step = step
        self._writing = False
        self._ended = False
        self._readers = 0
        self._broken = 0
        self._changed = threading.Condition()

    @property
    def step(self) -> int:
        """The step that the weights are of, or were of until the one under way."""
        with self._changed:
            return self._step

    @property
    def next_readable(self) -> int:
        """The earliest step that a reader could still get."""
        with self._changed:
            return self._step + (1 if self._writing and not self._ended else 0)

    @property
    def ended(self) -> bool:
        """Whether there will be no further step."""
        with self._changed:
            return self._ended

    def begin_write(self, deadline_s: float) -> bool:
        """Wait until nobody reads; afterwards the weights may change. Returns whether readers had to be broken off."""
        begin = time.monotonic()
        with self._changed:
            self._writing, self._ended = True, False
            self._changed.notify_all()
            free = self._changed.wait_for(lambda: self._readers == 0, deadline_s)
            if not free:
                self._broken += 1
            self.held_s += time.monotonic() - begin
            return not free

    def end_write(self, *, applied: bool = True) -> None:
        """Say that the weights are whole again: those of the next step or, if none was applied, of the same."""
        with self._changed:
            self._writing = False
            self._step += 1 if applied else 0
            self._changed.notify_all()

    def end(self) -> None:
        """Say that no further step will come; who waits for one is told. A later `begin_write` takes it back.

        A step that broke off half way, between `begin_write` and `end_write`, is never read.
        """
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @contextmanager
    def reading(self, step: int, deadline_s: float) -> Iterator[None]:
        """Wait for the weights of `step`, then keep them as they are while the context is open.

        Raises:
            StepMissedError: That step is past or will not come, or training could not wait for the context's end.
            TransferTimeoutError: It did not come within the deadline.
        """
        with self._changed:
            known = self._changed.wait_for(lambda: self._is_decided(step), deadline_s)
            if not known:
                message = f"step {step} did not come within {deadline_s:g} s; the weights are of step {self._step}"
                raise TransferTimeoutError(message, phase="read")
            if self._step != step or self._writing:
                message = f"step {step} cannot be had: the weights are of step {self._step}, or changing already"
                raise StepMissedError(message, phase="read", retryable=True)
            self._readers += 1
            broken = self._broken
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                is_torn = broken != self._broken
                self._changed.notify_all()
        if is_torn:
            message = f"training could not wait until step {step} was read; raise the hook's `hold_s`"
            raise StepMissedError(message, phase="read", retryable=True)

    def _is_decided(self, step: int) -> bool:
        if self._step > step or self._ended:
            return True
        return self._step == step
