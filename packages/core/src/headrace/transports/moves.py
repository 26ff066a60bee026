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

    Owns nothing: whoever made it keeps the memory.
    """

    def __init__(self, destinations: I64, sources: I64, num_bytes: I64) -> None:
        parts = -(-num_bytes // PIECE_BYTES)
        row = np.repeat(np.arange(len(parts)), parts)
        begin = (np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)) * PIECE_BYTES
        size = np.minimum(num_bytes[row] - begin, PIECE_BYTES)
        self._row = row
        self._pieces = list(
            zip(
                (destinations[row] + begin).tolist(),
                (sources[row] + begin).tolist(),
                size.tolist(),
                strict=True,
            )
        )

    def run(self) -> None:
        """Move everything; holds the interpreter lock but for what its switch interval gives to other threads."""
        for destination, source, size in self._pieces:
            _memmove(destination, source, size)

    def differences(self) -> list[int]:
        """Return the moves whose destination differs from its source, in ascending order."""
        unequal = [_memcmp(*piece) != 0 for piece in self._pieces]
        return sorted(set(self._row[unequal].tolist()))
