"""The pseudo-random multipliers of digests, cached per device."""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np
import torch

from headrace.types import U64

ROW_SEED, WORD_SEED = 0x48656164726F7773, 0x48656164576F7264


def splitmix64(begin: int, end: int, seed: int) -> U64:
    """Return the odd multipliers of the indices `[begin, end)`: uint64 of shape (end - begin,).

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014; the last bit is set.
    """
    x = np.arange(begin, end, dtype=np.uint64) + np.uint64(1)
    x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


class FactorTable:
    """A growing table of multipliers on one device; slices that were handed out stay valid."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device = seed, device
        self._table = torch.zeros(0, dtype=torch.int64, device=device)
        self._lock = threading.Lock()

    def first(self, count: int) -> torch.Tensor:
        """Return a table of at least `count` multipliers as int64."""
        table = self._table
        if len(table) >= count:
            return table
        with self._lock:
            if len(self._table) < count:
                size = max(1024, 1 << (count - 1).bit_length())
                made = torch.from_numpy(splitmix64(0, size, self._seed).view(np.int64))
                self._table = made.to(self._device)
            return self._table


@lru_cache
def factors(device: torch.device) -> tuple[FactorTable, FactorTable]:
    """Return the tables A (rows) and B (words) of a device."""
    return FactorTable(ROW_SEED, device), FactorTable(WORD_SEED, device)
