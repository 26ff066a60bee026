"""MappedMemory: what a descriptor holds, at an address where huge pages fit."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000

libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.madvise.restype = ctypes.c_int
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)


class MappedMemory:
    """Memory of a descriptor at an address where huge pages fit; unmapped when the last reference goes.

    Args:
        fd: What to map, the caller's before and after; -1 for memory of its own, shared with children.
        num_bytes: Size.
        writable: Whether it may be written.
        private: Writes stay here.

    Attributes:
        address: First byte, a multiple of `HUGE_PAGE`.

    Raises:
        OSError: The kernel refuses.
    """

    def __init__(self, fd: int, num_bytes: int, *, writable: bool, private: bool = False) -> None:
        self._room = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=0)
        self.address = round_up(np.frombuffer(self._room, np.uint8).ctypes.data, HUGE_PAGE)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = _MAP_FIXED | (mmap.MAP_PRIVATE if private else mmap.MAP_SHARED)
        flags |= mmap.MAP_ANONYMOUS if fd < 0 else 0
        placed = libc.mmap(self.address, num_bytes, protection, flags, fd, 0)
        if placed != self.address:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        libc.madvise(self.address, num_bytes, _MADV_HUGEPAGE)


def round_up(number: int, unit: int) -> int:
    """Return the least multiple of `unit` that is not below `number`."""
    return -(-number // unit) * unit
