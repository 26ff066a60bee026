"""MappedMemory: what a descriptor holds, at an address where huge pages fit."""

from __future__ import annotations

import ctypes
import os
import weakref

HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.madvise.restype = ctypes.c_int
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
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
        room = _map(None, num_bytes + HUGE_PAGE, 0, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        weakref.finalize(self, libc.munmap, room, num_bytes + HUGE_PAGE).atexit = False
        self.address = round_up(room, HUGE_PAGE)
        protection = _PROT_READ | (_PROT_WRITE if writable else 0)
        flags = _MAP_FIXED | (_MAP_PRIVATE if private else _MAP_SHARED) | (_MAP_ANONYMOUS if fd < 0 else 0)
        _map(self.address, num_bytes, protection, flags, fd)
        libc.madvise(self.address, num_bytes, _MADV_HUGEPAGE)


def _map(address: int | None, num_bytes: int, protection: int, flags: int, fd: int) -> int:
    placed: int = libc.mmap(address, num_bytes, protection, flags, fd, 0)
    if placed == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return placed


def round_up(number: int, unit: int) -> int:
    """Return the least multiple of `unit` that is not below `number`."""
    return -(-number // unit) * unit
