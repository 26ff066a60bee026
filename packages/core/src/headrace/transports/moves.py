"""Dense host-to-host copies as lists of addresses, moved piece by piece by the C library."""

from __future__ import annotations

import ctypes

import numpy as np

from headrace.types import I64

PIECE_BYTES = 512 << 10
"""Largest piece. Processors copy blocks of up to about their second-level cache by `rep movsb` without first reading
what they overwrite; the C library leaves that way at 0.7 to 1 MiB. Two processes at once on an EPYC (Zen 5), GB/s
each: pieces of 512 KiB 12.7, of 4 MiB 11.3, torch's `copy_` 11.5."""

# PYFUNCTYPE keeps the interpreter lock: a busy Python thread would otherwise hold each piece up by a switch interval.
_memmove = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.CDLL(None).memmove, ctypes.c_void_p).value or 0
)
_memcmp = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.CDLL(None).memcmp, ctypes.c_void_p).value or 0
)


class Moves:
    """Moves of `num_bytes` from `sources` to `destinations`, all absolute addresses, shape (N,).

    Owns nothing: whoever made it keeps the memory. Moves that continue each other on both sides are made as one.
    """

    def __init__(self, destinations: I64, sources: I64, num_bytes: I64) -> None:
        self._whole = (destinations, sources, num_bytes)
        self._pieces = _cut(*_joined(destinations, sources, num_bytes))

    def run(self) -> None:
        """Move everything; holds the interpreter lock but for what its switch interval gives to other threads."""
        for destination, source, size in self._pieces:
            _memmove(destination, source, size)

    def differences(self) -> list[int]:
        """Return the moves whose destination differs from its source, in ascending order."""
        whole = zip(*(column.tolist() for column in self._whole), strict=True)
        return [row for row, move in enumerate(whole) if _memcmp(*move) != 0]


def _joined(destinations: I64, sources: I64, num_bytes: I64) -> tuple[I64, I64, I64]:
    """Return the moves in the order of their destinations, those that continue each other as one."""
    order = np.argsort(destinations)
    destinations, sources, num_bytes = destinations[order], sources[order], num_bytes[order]
    begins = np.ones(len(order), bool)
    begins[1:] = destinations[1:] != (destinations + num_bytes)[:-1]
    begins[1:] |= sources[1:] != (sources + num_bytes)[:-1]
    first = np.flatnonzero(begins)
    if not len(first):
        return destinations, sources, num_bytes
    return destinations[first], sources[first], np.add.reduceat(num_bytes, first)


def _cut(destinations: I64, sources: I64, num_bytes: I64) -> list[tuple[int, int, int]]:
    parts = -(-num_bytes // PIECE_BYTES)
    row = np.repeat(np.arange(len(parts)), parts)
    begin = (np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)) * PIECE_BYTES
    size = np.minimum(num_bytes[row] - begin, PIECE_BYTES)
    columns = (destinations[row] + begin, sources[row] + begin, size)
    return list(zip(*(column.tolist() for column in columns), strict=True))
