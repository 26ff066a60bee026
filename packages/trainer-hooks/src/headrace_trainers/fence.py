"""StepFence: keeps an optimizer from changing weights that are being read, and readers from reading half a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from headrace.errors import StepMissedError, TransferTimeoutError


class Reading:
    """One open context of `StepFence.reading`."""

    def __init__(self, fence: StepFence, broken: int) -> None:
        self._fence = fence
        self._broken = broken

    def leave(self, order: Callable[[], None]) -> None:
        """Hold the training thread no more: from now on devices read by themselves, and `order` keeps them whole.

        `begin_write` calls it in the training thread, before weights change; whatever that thread has devices do from
        then on comes after the reads. Without effect in a context that is closed, was left, or was broken off.

        Args:
            order: Does not wait.
        """
        self._fence._leave(self, order)


class StepFence:
    """Counts this rank's steps; the weights of one stay as they are while anybody reads them.

    The training thread calls `begin_write` before weights change and `end_write` after; a reader's thread opens
    `reading`. A reader never makes training wait for longer than `begin_write`'s deadline: then it is told that what it
    read is worth nothing. A reader that only waits for devices makes those wait instead of the training thread.

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
        self._inside: set[Reading] = set()  # the readers whose contexts are open
        self._orders: dict[Reading, Callable[[], None]] = {}  # those that have left
        self._broken = 0
        self._awaited: dict[int, int] = {}  # step to how many wait for it
        self._begun: dict[int, int] = {}  # step to `_broken` when those who waited were counted as readers
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
        """Wait until no thread reads; afterwards the weights may change. Returns whether readers had to be broken off.

        In the training thread: where devices still read, its next writes on their streams come after that.
        """
        begin = time.monotonic()
        with self._changed:
            self._writing, self._ended = True, False
            self._changed.notify_all()
            free = self._changed.wait_for(lambda: self._readers == 0, deadline_s)
            if not free:
                self._broken += 1
            orders = list(self._orders.values())
            self.held_s += time.monotonic() - begin
        for order in orders:
            order()
        return not free

    def end_write(self, *, applied: bool = True) -> None:
        """Say that the weights are whole again: those of the next step or, if none was applied, of the same.

        Who waits for this step reads from now on: the next `begin_write` cannot come before it.
        """
        with self._changed:
            self._writing = False
            self._step += 1 if applied else 0
            if applied and (waiting := self._awaited.get(self._step, 0)):
                self._readers += waiting
                self._begun[self._step] = self._broken
            self._changed.notify_all()

    def end(self) -> None:
        """Say that no further step will come; who waits for one is told. A later `begin_write` takes it back.

        A step that broke off half way, between `begin_write` and `end_write`, is never read.
        """
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @contextmanager
    def reading(self, step: int, deadline_s: float) -> Iterator[Reading]:
        """Wait for the weights of `step`, then keep them as they are while the context is open, or until it is left.

        Raises:
            StepMissedError: That step is past or will not come, or training could not wait for the context's end.
            TransferTimeoutError: It did not come within the deadline.
        """
        with self._changed:
            reading = Reading(self, self._enter(step, deadline_s))
            self._inside.add(reading)
        try:
            yield reading
        finally:
            with self._changed:
                self._inside.remove(reading)
                has_left = self._orders.pop(reading, None) is not None
                self._readers -= 0 if has_left else 1
                is_torn = not has_left and reading._broken != self._broken
                self._changed.notify_all()
        if is_torn:
            message = f"training could not wait until step {step} was read; raise the hook's `hold_s`"
            raise StepMissedError(message, phase="read", retryable=True)

    def _leave(self, reading: Reading, order: Callable[[], None]) -> None:
        """Count a reader no more; one that was broken off stays, and is told when it ends."""
        with self._changed:
            if reading in self._inside and reading not in self._orders and reading._broken == self._broken:
                self._orders[reading] = order
                self._readers -= 1
                self._changed.notify_all()

    def _enter(self, step: int, deadline_s: float) -> int:
        """Count a reader of `step`; returns how many readers had been broken off when it began to count."""
        if self._step == step and not self._writing:
            self._readers += 1
            return self._broken
        if self._step >= step or self._ended:
            message = f"step {step} cannot be had: the weights are of step {self._step}, or changing already"
            raise StepMissedError(message, phase="read", retryable=True)
        self._awaited[step] = self._awaited.get(step, 0) + 1
        self._changed.wait_for(lambda: self._step >= step or self._ended, deadline_s)
        self._awaited[step] -= 1
        begun = self._begun.get(step)
        if not self._awaited[step]:
            self._begun.pop(step, None)
            del self._awaited[step]
        if begun is not None:
            return begun  # counted by `end_write`
        message = f"step {step} did not come within {deadline_s:g} s; the weights are of step {self._step}"
        if self._ended:
            raise StepMissedError(message, phase="read", retryable=True)
        raise TransferTimeoutError(message, phase="read")
