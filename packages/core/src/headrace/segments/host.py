"""Host segments: anonymous memory in a sealed memfd, owned by one process and mapped by others."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

import torch

from headrace.errors import (
    CapacityError,
    ConfigError,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from headrace.manifest import SegmentDescriptor
from headrace.segments.capacity import require_memory
from headrace.segments.pages import PAGE, map_tensor, populate
from headrace.segments.pinning import PIN_CHUNK_BYTES, PinnedRange

_BREATH_S = 2e-4
_SEAL_FUTURE_WRITE = 0x10
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_unsealed: weakref.WeakValueDictionary[int, HostSegment] = weakref.WeakValueDictionary()


class HostSegment:
    """A piece of host memory that this process owns and lends by file descriptor. A handle: it stays home.

    Nothing has a name in any file system: the memory ends with the last process that maps it.

    Args:
        num_bytes: Size; fixed for life by seals.
        what: What it is for, in messages and in `/proc/PID/fd`.
        peers_write: Let borrowers map it writable (ring slots shared with a colocated worker). Otherwise a
            seal keeps every mapping but the owner's read-only, where the kernel has it (5.1).
        sealed: Set that seal at once; otherwise `seal` does, and until then `write` may be used.

    Attributes:
        fd: The memfd; the segment's until `close`.
        descriptor: What a peer needs to borrow it.

    Raises:
        CapacityError: The machine or the control group has too little memory.
    """

    def __init__(
        self, num_bytes: int, what: str = "headrace", *, peers_write: bool = False, sealed: bool = True
    ) -> None:
        if num_bytes <= 0:
            raise ConfigError(f"a segment of {num_bytes} bytes cannot be mapped; the least is 1", name=what)
        require_memory(num_bytes, what)
        self.fd = os.memfd_create(what, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            self._tensor: torch.Tensor | None = self._prepare(num_bytes)
        except OSError as error:
            os.close(self.fd)
            message = (
                f"{what}: {num_bytes} bytes of memory could not be mapped: {error}; lower the segment size"
            )
            raise CapacityError(message, name=what) from error
        self.descriptor = SegmentDescriptor(segment_id=secrets.token_hex(16), num_bytes=num_bytes)
        self._peers_write = peers_write
        _unsealed[self._tensor.data_ptr()] = self
        if sealed:
            self.seal()

    def _prepare(self, num_bytes: int) -> torch.Tensor:
        os.ftruncate(self.fd, num_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
        return map_tensor(self.fd, num_bytes, writable=True)

    @property
    def sealed(self) -> bool:
        """Whether nobody can get at it writable any more but by mappings that there are."""
        return self._tensor is None or _unsealed.get(self._tensor.data_ptr()) is not self

    def seal(self) -> None:
        """Set the last seals: before anybody borrows it. Idempotent."""
        if self.sealed:
            return
        last = fcntl.F_SEAL_SEAL
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, last if self._peers_write else last | _SEAL_FUTURE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, last)
        del _unsealed[self.tensor.data_ptr()]

    def write(self, begin: int, data: memoryview) -> None:
        """Write bytes by way of the descriptor, before `seal`. Blocking, without the GIL.

        Pages come into being with their bytes, neither cleared nor mapped before. On an EPYC 1 GiB took 0.57 s of
        processor time that way, and 0.97 s to be made by page faults and 0.1 s to be copied.

        Raises:
            LocalProtocolError: It is sealed.
            CapacityError: There is no memory left.
        """
        if self.sealed:
            raise LocalProtocolError(f"segment {self.descriptor.segment_id} is sealed; write into its memory")
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self.fd, data[done:], begin + done)
            except OSError as error:
                message = f"segment {self.descriptor.segment_id} cannot be written: {error}"
                raise CapacityError(message, name=self.descriptor.segment_id) from error

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes as a flat uint8 tensor; writable. Views of it keep the memory alive after `close`.

        Raises:
            LocalProtocolError: The segment is closed.
        """
        if self._tensor is None:
            raise LocalProtocolError(f"segment {self.descriptor.segment_id} is closed; make a new one")
        return self._tensor

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._tensor is None

    def close(self) -> None:
        """Give the memory back once no view and no peer holds it; idempotent."""
        if self._tensor is not None:
            if not self.sealed:
                del _unsealed[self._tensor.data_ptr()]
            self._tensor = None
            os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def host_segments(sizes: Sequence[int], what: str, *, sealed: bool = True) -> list[HostSegment]:
    """Return a segment of each size, or none at all; see HostSegment.

    Raises:
        CapacityError: There is no room for one of them.
    """
    with ExitStack() as stack:
        made = [stack.enter_context(HostSegment(size, what, sealed=sealed)) for size in sizes]
        stack.pop_all()
    return made


def unsealed(block: torch.Tensor) -> HostSegment | None:
    """Return the segment of this process whose whole memory `block` is, if `write` still works on it."""
    found = _unsealed.get(block.data_ptr()) if block.device.type == "cpu" else None
    return found if found is not None and found.descriptor.num_bytes == block.nbytes else None


class MappedSegment:
    """A peer's segment in this process's address space: shared, read-only unless asked otherwise.

    The pages stay valid after the owner has died, and their number cannot shrink: `__init__` refuses memory
    without seals, which could be cut off under a reader.

    Args:
        fd: Received descriptor; the caller's before and after.
        descriptor: What the manifest says about it.
        writable: Map it writable; only for segments made with `peers_write`.

    Raises:
        RemoteProtocolError: The descriptor is no sealed memfd, or smaller than announced.
    """

    def __init__(self, fd: int, descriptor: SegmentDescriptor, *, writable: bool = False) -> None:
        self.descriptor = descriptor
        self._pinned: PinnedRange | None = None
        _check_lent(fd, descriptor)
        try:
            self._tensor: torch.Tensor | None = map_tensor(fd, descriptor.num_bytes, writable=writable)
        except OSError as error:
            way_out = "ask the holder for a writable segment" if writable else "raise the address space limit"
            message = f"segment {descriptor.segment_id} could not be mapped: {error}; {way_out}"
            raise TransportError(message, name=descriptor.segment_id) from error

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes as a flat uint8 tensor; writing into a read-only mapping ends the process.

        Raises:
            LocalProtocolError: The mapping is closed.
        """
        if self._tensor is None:
            raise LocalProtocolError(
                f"mapping of segment {self.descriptor.segment_id} is closed; borrow it again"
            )
        return self._tensor

    def populate(self, chunk_bytes: int = 64 << 20, between: Callable[[], None] | None = None) -> None:
        """Map all pages now, chunk by chunk, so that later reads fault nowhere. Blocking, without the GIL.

        Args:
            chunk_bytes: Bytes per system call; small chunks disturb a serving engine less.
            between: Called after each chunk; may sleep, may raise to stop.

        Raises:
            TransportError: The kernel could not bring a page in.
        """
        step = max(PAGE, chunk_bytes // PAGE * PAGE)
        size = self.descriptor.num_bytes
        for begin in range(0, size, step):
            try:
                populate(self.tensor[begin : min(begin + step, size)])
            except OSError as error:
                name = self.descriptor.segment_id
                message = f"pages of segment {name} could not be mapped: {error.strerror}; is the host out of memory?"
                raise TransportError(message, name=name) from error
            if between is not None:
                between()

    def prepare(self, chunk_bytes: int, *, pin: bool, whole: bool = False) -> None:
        """Make all pages ready to be copied from, once: mapped, and for copies by a GPU page-locked until `close`.

        Blocking, without the GIL, chunk by chunk with a breath in between: the driver lets nobody else in meanwhile.
        `whole`: page-locked in one piece, for copies that know nothing of chunks, of an engine that may stand still.

        Raises:
            TransportError: The kernel could not bring a page in.
            CapacityError: A limit on locked memory.
            BackendUnavailableError: The driver cannot page-lock read-only mappings.
        """
        if self._pinned is None:
            self.populate(chunk_bytes)
            if pin:
                address, size = self.tensor.data_ptr(), self.descriptor.num_bytes
                chunk = size if whole else PIN_CHUNK_BYTES
                self._pinned = PinnedRange(address, size, lambda: time.sleep(_BREATH_S), chunk_bytes=chunk)

    def close(self) -> None:
        """Unmap once no view is left; idempotent. No GPU may be reading it any more."""
        if self._pinned is not None:
            self._pinned.close()
            self._pinned = None
        self._tensor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_lent(fd: int, descriptor: SegmentDescriptor) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    problem = ""
    if not seals & fcntl.F_SEAL_SHRINK:
        problem = "is not sealed against shrinking"
    elif (size := os.fstat(fd).st_size) < descriptor.num_bytes:
        problem = f"has {size} bytes, announced are {descriptor.num_bytes}"
    if problem:
        message = f"segment {descriptor.segment_id} {problem}; the holder must run this version of Headrace"
        raise RemoteProtocolError(message, name=descriptor.segment_id)
