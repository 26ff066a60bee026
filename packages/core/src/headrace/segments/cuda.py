"""CUDA segments: a GPU's memory, lent by IPC handle to processes of the same host; nothing is copied."""

from __future__ import annotations

import hashlib

import torch

from headrace.errors import (
    BackendUnavailableError,
    CapacityError,
    ConfigError,
    ConnectError,
    HeadraceError,
    LocalProtocolError,
)
from headrace.manifest import SegmentDescriptor
from headrace.segments.cudart import IPC_HANDLE_BYTES, cuda_runtime

GRAIN_BYTES = 2 << 20
"""What drivers give GPU memory out in: smaller allocations share it, and would be lent together."""

_owned_here: dict[str, int] = {}
"""Addresses of this process's own segments: a process cannot open its own IPC handles."""


def uuid_of(device: torch.device | int) -> str:
    """Return which GPU a device is, whatever processes number it."""
    return str(torch.cuda.get_device_properties(device).uuid)


def gpu_of(device_uuid: str) -> torch.device:
    """Return the GPU with this uuid, as this process numbers them; initialises CUDA here.

    Raises:
        BackendUnavailableError: This process does not see it; says what it sees.
    """
    if not torch.cuda.is_available():
        message = f"torch {torch.__version__} of the holder sees no GPU; install one that is built for CUDA"
        raise BackendUnavailableError(message, name=device_uuid)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    seen = [uuid_of(i) for i in range(torch.cuda.device_count())]
    if device_uuid not in seen:
        message = (
            f"the holder does not see GPU {device_uuid}, only {', '.join(seen)}; give it the engine's "
            "CUDA_VISIBLE_DEVICES, and its container the same GPUs"
        )
        raise BackendUnavailableError(message, name=device_uuid)
    return torch.device("cuda", seen.index(device_uuid))


class CudaSegment:
    """One allocation of this process on a GPU, as it is lent. A handle: it stays home; it owns nothing.

    Args:
        address: Any address in the allocation.
        salt: The holder's own: segment ids are the same for an allocation's life and differ between holders.

    Attributes:
        address: First byte of the allocation.
        descriptor: What a peer needs to open it.

    Raises:
        ConfigError: The allocation cannot be lent.
    """

    def __init__(self, address: int, salt: str) -> None:
        self.address, num_bytes = cuda_runtime().allocation_of(address)
        try:
            handle = cuda_runtime().ipc_export(self.address)
        except HeadraceError as error:
            message = (
                f"GPU memory cannot be lent: {error}; torch must allocate it without expandable_segments, or let the "
                "source be read into host memory"
            )
            raise ConfigError(message, name="expandable_segments") from error
        identity = hashlib.sha256(f"{salt}{self.address}{num_bytes}".encode() + handle).hexdigest()[:32]
        uuid = uuid_of(cuda_runtime().device_of(address))
        self.descriptor = SegmentDescriptor(identity, num_bytes, "cuda", handle, uuid)

    @property
    def tensor(self) -> torch.Tensor:
        """The allocation as a flat uint8 tensor; valid as long as its owner keeps it."""
        return device_bytes(self.address, self.descriptor.num_bytes)


class OwnedCudaSegment(CudaSegment):
    """Memory of a GPU that this process has allocated to lend it, apart from torch's allocator. A handle; owns it.

    Args:
        num_bytes: Size; rounded up to `GRAIN_BYTES`.
        device: The GPU.
        salt: As CudaSegment's.

    Raises:
        CapacityError: The GPU has no room.
        ConfigError: Its memory cannot be lent.
    """

    def __init__(self, num_bytes: int, device: torch.device, salt: str) -> None:
        self._device = device
        self._owned: int | None = None
        size = -(-num_bytes // GRAIN_BYTES) * GRAIN_BYTES
        with torch.cuda.device(device):
            self._owned = _allocate(size, device)
            try:
                super().__init__(self._owned, salt)
            except BaseException:
                self.close()
                raise
        _owned_here[self.descriptor.segment_id] = self._owned

    def close(self) -> None:
        """Give the memory back; idempotent. Nothing of this process may be using it any more."""
        if self._owned is not None:
            address, self._owned = self._owned, None
            if hasattr(self, "descriptor"):
                _owned_here.pop(self.descriptor.segment_id, None)
            with torch.cuda.device(self._device):
                cuda_runtime().free(address)


def _allocate(num_bytes: int, device: torch.device) -> int:
    try:
        return cuda_runtime().allocate(num_bytes)
    except CapacityError:
        torch.cuda.empty_cache()
    try:
        return cuda_runtime().allocate(num_bytes)
    except CapacityError as error:
        free, total = torch.cuda.mem_get_info(device)
        message = (
            f"{device} has {free / 1e6:.0f} MB of {total / 1e6:.0f} MB free, the ring takes {num_bytes / 1e6:.0f} MB; "
            "lower budget_bytes or bucket_bytes, or leave more memory free beside the engine"
        )
        raise CapacityError(message, name="budget_bytes", phase="stage") from error


class MappedCudaSegment:
    """A peer's GPU memory in this process's address space, on the calling thread's current device or a peer of it.

    Raises:
        ConnectError: It cannot be opened here; says why.
    """

    def __init__(self, descriptor: SegmentDescriptor) -> None:
        self.descriptor = descriptor
        if len(descriptor.ipc_handle) != IPC_HANDLE_BYTES:
            message = f"segment {descriptor.segment_id} has no IPC handle; the holder must run this version of Headrace"
            raise ConnectError(message, name=descriptor.segment_id)
        self._opened_on = torch.cuda.current_device()
        self._address: int | None = None
        own = _owned_here.get(descriptor.segment_id)
        self._tensor: torch.Tensor | None = None
        if own is not None:
            self._tensor = device_bytes(own, descriptor.num_bytes)
            return
        try:
            self._address = cuda_runtime().ipc_open(descriptor.ipc_handle)
        except HeadraceError as error:
            message = (
                f"GPU memory of segment {descriptor.segment_id} cannot be opened: {error}; both processes must see the "
                "holder's GPU (CUDA_VISIBLE_DEVICES, container), and it must be a peer of this one"
            )
            raise ConnectError(message, name=descriptor.segment_id) from error
        self._tensor = device_bytes(self._address, descriptor.num_bytes)

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes as a flat uint8 tensor on the holder's GPU.

        Raises:
            LocalProtocolError: The mapping is closed.
        """
        if self._tensor is None:
            message = f"mapping of segment {self.descriptor.segment_id} is closed; open it again"
            raise LocalProtocolError(message)
        return self._tensor

    def prepare(self, chunk_bytes: int, *, pin: bool) -> None:
        """Do nothing: a GPU's memory is always there."""

    def close(self) -> None:
        """Unmap; idempotent. Nothing may be reading it any more."""
        self._tensor = None
        if self._address is not None:
            with torch.cuda.device(self._opened_on):
                cuda_runtime().ipc_close(self._address)
            self._address = None


class _Span:
    """Memory in the form in which array libraries hand GPU memory to each other."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


def device_bytes(address: int, num_bytes: int) -> torch.Tensor:
    """Return memory of a GPU as a flat uint8 tensor that owns nothing."""
    device = torch.device("cuda", cuda_runtime().device_of(address))
    tensor = torch.as_tensor(_Span(address, num_bytes), device=device)
    if tensor.data_ptr() != address:
        raise LocalProtocolError(f"torch copied {num_bytes} bytes of {device} instead of sharing them")
    return tensor
