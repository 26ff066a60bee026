"""Pages of shared memory: mapped as tensors, and brought in before they are used."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from pathlib import Path

import torch

from headrace.mapping import HUGE_PAGE, MappedMemory, libc, round_up

PAGE = mmap.PAGESIZE
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 22, 23, 25
_SLOWEST_HUGE_S = 1.2e-3


def map_tensor(fd: int, num_bytes: int, *, writable: bool) -> torch.Tensor:
    """Map `fd` shared; the tensor owns the mapping.

    torch warns about read-only buffers, so it is shown a ctypes array at the mapping's address instead.
    """
    mapping = MappedMemory(fd, num_bytes, writable=writable)
    array = (ctypes.c_uint8 * num_bytes).from_address(mapping.address)
    array.mapping = mapping  # type: ignore[attr-defined]
    return torch.frombuffer(array, dtype=torch.uint8)


def populate(pages: torch.Tensor) -> None:
    """Map all pages that there are, so that reads fault nowhere. Blocking, without the GIL.

    Raises:
        OSError: The kernel could not bring a page in.
    """
    if libc.madvise(pages.data_ptr(), pages.numel(), _MADV_POPULATE_READ) == 0:
        return
    code = ctypes.get_errno()
    if code != errno.EINVAL:
        raise OSError(code, os.strerror(code))
    pages[::PAGE].sum()


def make_pages(memory: torch.Tensor, *, huge: bool = True) -> bool:
    """Bring in the pages that lie wholly in writable memory, so that writes into it fault nowhere; bytes stay.

    Blocking, without the GIL. Where the kernel cannot, the first write brings them in.

    Args:
        memory: Flat; nobody needs to be kept from using it meanwhile.
        huge: Make huge pages of whatever lies in one wholly, and where that is not to be had small ones.

    Returns:
        Whether huge pages are to be had, and come sooner than small ones: not so where the kernel has to clear
        fragmented memory for them, or a hypervisor took idle memory back.
    """
    begin, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
    good = huge and _collapse(round_up(begin, HUGE_PAGE), end // HUGE_PAGE * HUGE_PAGE)
    _populate_write(round_up(begin, PAGE), end // PAGE * PAGE)
    return good


def _collapse(begin: int, end: int) -> bool:
    """Make huge pages of `[begin, end)`, which the kernel does of such as have a page already (Linux 6.1)."""
    start_s = time.thread_time()
    for address in range(begin, end, HUGE_PAGE):
        _populate_write(address, address + PAGE)
    if end > begin and libc.madvise(begin, end - begin, _MADV_COLLAPSE):
        return False
    return time.thread_time() - start_s <= _SLOWEST_HUGE_S * max(end - begin, HUGE_PAGE) / HUGE_PAGE


def _populate_write(begin: int, end: int) -> None:
    if end > begin:
        libc.madvise(begin, end - begin, _MADV_POPULATE_WRITE)


def has_huge_pages(memory: torch.Tensor) -> bool:
    """Return whether this process maps huge pages at the begin of `memory`."""
    begin, inside = f"{memory.data_ptr():x}-", False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if not line[0].isupper():
            inside = line.startswith(begin)
        elif inside and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1]) > 0
    return False
