"""Counters in shared memory by which a broadcasting holder and its receivers hand ring slots to each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from headrace.errors import PeerLostError, TransferTimeoutError

if TYPE_CHECKING:
    import torch

_FILLED, _CANCELLED, _FIRST_APPLIED = 0, 1, 8
_STRIDE = 8
_POLL_S = 0.0002


def signal_bytes(num_receivers: int) -> int:
    """Return the size of the signal segment; each counter has its own cache line."""
    return (_FIRST_APPLIED + _STRIDE * num_receivers) * 8


class RingSignals:
    """Monotonic counters over a shared, writable block: one writer per word, so no locks.

    The holder writes how many buckets are filled, receiver `i` how many it has applied. A word is published after
    the bytes it speaks of; the store is a single aligned 64-bit write.
    """

    def __init__(self, block: torch.Tensor) -> None:
        self._words: np.ndarray = block.numpy().view(np.int64)

    @property
    def num_receivers(self) -> int:
        """Receivers that this block has words for."""
        return (len(self._words) - _FIRST_APPLIED) // _STRIDE

    def reset(self) -> None:
        """Set all counters to zero; by the holder, before receivers are told of the ring."""
        self._words[:] = 0

    def announce(self, filled: int) -> None:
        """Say that buckets `[0, filled)` are in their slots. Holder only."""
        self._words[_FILLED] = filled

    def cancel(self) -> None:
        """Say that no more buckets come. Holder only."""
        self._words[_CANCELLED] = 1

    def applied(self, receiver: int, count: int) -> None:
        """Say that receiver `receiver` needs the slots of buckets `[0, count)` no more."""
        self._words[_FIRST_APPLIED + _STRIDE * receiver] = count

    def wait_filled(self, count: int, deadline_s: float, alive: Callable[[], None]) -> None:
        """Wait until `count` buckets are filled. Receiver only.

        Raises:
            PeerLostError: The holder cancelled.
            TransferTimeoutError: Not within the deadline.
        """
        self._wait(
            lambda: int(self._words[_FILLED]) >= count, deadline_s, alive, f"bucket {count - 1} of the ring"
        )

    def wait_applied(self, count: int, deadline_s: float, alive: Callable[[], None]) -> None:
        """Wait until every receiver has applied `count` buckets. Holder only."""
        words = self._words[_FIRST_APPLIED::_STRIDE]
        self._wait(
            lambda: bool((words >= count).all()), deadline_s, alive, f"receivers to take bucket {count - 1}"
        )

    def _wait(
        self, ready: Callable[[], bool], deadline_s: float, alive: Callable[[], None], what: str
    ) -> None:
        limit = time.monotonic() + deadline_s
        while not ready():
            alive()
            if self._words[_CANCELLED]:
                message = f"the broadcast was cancelled while waiting for {what}"
                raise PeerLostError(message)
            if time.monotonic() > limit:
                message = f"waited {deadline_s:.1f} s for {what}"
                raise TransferTimeoutError(message)
            time.sleep(_POLL_S)
