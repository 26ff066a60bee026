"""The CUDA runtime that torch has loaded, as far as torch does not offer it: page-locking, batched copies, IPC."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.errors import BackendUnavailableError, CapacityError, HeadraceError, TransportError
from headrace.types import I64

_SUCCESS = 0
_INVALID_VALUE = 1
_OUT_OF_MEMORY = 2
_DEFAULT_KIND = 4
_REGISTER_READ_ONLY = 0x8
_REGISTER_PORTABLE = 0x1
_ALREADY_REGISTERED = 712
_NOT_SUPPORTED = 801
_ACCESS_ORDER_STREAM = 1
IPC_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_PCI_ADDRESS_BYTES = 32
_BATCH_SINCE = 12080
_BATCH_WITHOUT_FAIL_INDEX_SINCE = 13000

_ERRORS: dict[int, tuple[type[HeadraceError], str]] = {
    _INVALID_VALUE: (TransportError, "the memory is not what it was announced to be; report this"),
    _OUT_OF_MEMORY: (
        CapacityError,
        "raise `ulimit -l`, the container's memory limit, or free memory of the host",
    ),
    _ALREADY_REGISTERED: (
        TransportError,
        "another part of this process has page-locked it; give it another mapping",
    ),
    _NOT_SUPPORTED: (
        BackendUnavailableError,
        "this driver cannot page-lock read-only mappings; update it, or use `--transport tcp`",
    ),
}


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * IPC_HANDLE_BYTES),)


class CudaRuntime:
    """Calls of `libcudart` on the calling thread's current device; failures become Headrace errors.

    Args:
        library: The loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        version = ctypes.c_int()
        self._check(library.cudaRuntimeGetVersion(ctypes.byref(version)), "asking for the CUDA version")
        self.version = version.value
        self._attributes = (ctypes.c_int * 6)(_ACCESS_ORDER_STREAM)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def register(self, address: int, num_bytes: int, *, writable: bool = False) -> None:
        """Page-lock memory, so that every device of this process can read it; `writable` if devices write there too.

        Memory that is mapped read-only cannot be writable for a device.

        Raises:
            CapacityError: A limit on locked memory.
            BackendUnavailableError: The driver cannot do it.
        """
        code = self._library.cudaHostRegister(
            ctypes.c_void_p(address),
            ctypes.c_size_t(num_bytes),
            ctypes.c_uint(_REGISTER_PORTABLE | (0 if writable else _REGISTER_READ_ONLY)),
        )
        self._check(code, f"page-locking {num_bytes} bytes for copies by the GPU")

    def unregister(self, address: int) -> None:
        """Take `register` back."""
        self._check(
            self._library.cudaHostUnregister(ctypes.c_void_p(address)), "giving page-locked memory back"
        )

    def allocate(self, num_bytes: int) -> int:
        """Return memory of the current device that no allocator of torch has a part in: it can always be lent.

        Raises:
            CapacityError: The device has no room.
        """
        address = ctypes.c_void_p()
        code = self._library.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(num_bytes))
        self._check(code, f"allocating {num_bytes} bytes of GPU memory")
        return address.value or 0

    def free(self, address: int) -> None:
        """Take `allocate` back; waits for everything that the device was given."""
        self._check(self._library.cudaFree(ctypes.c_void_p(address)), "giving GPU memory back")

    def pci_address(self, device: int) -> str:
        """Return where a GPU sits, as `/sys/bus/pci/devices` names it: `0000:1b:00.0`."""
        text = ctypes.create_string_buffer(_PCI_ADDRESS_BYTES)
        code = self._library.cudaDeviceGetPCIBusId(text, ctypes.c_int(len(text)), ctypes.c_int(device))
        self._check(code, "asking where a GPU sits")
        return text.value.decode().lower()

    def allocation_of(self, address: int) -> tuple[int, int]:
        """Return begin and size of the device allocation that an address lies in."""
        begin, size = ctypes.c_uint64(), ctypes.c_size_t()
        driver = ctypes.CDLL("libcuda.so.1")
        code = driver.cuMemGetAddressRange_v2(ctypes.byref(begin), ctypes.byref(size), ctypes.c_uint64(address))
        self._check(code, "asking for the bounds of GPU memory")
        return begin.value, size.value

    def device_of(self, address: int) -> int:
        """Return the number of the GPU that memory lies on."""
        found = (ctypes.c_uint64 * 16)()
        code = self._library.cudaPointerGetAttributes(found, ctypes.c_void_p(address))
        self._check(code, "asking where memory lies")
        return int(found[0] >> 32)

    def ipc_export(self, address: int) -> bytes:
        """Return the handle by which another process of this host opens an allocation."""
        handle = _IpcHandle()
        code = self._library.cudaIpcGetMemHandle(ctypes.byref(handle), ctypes.c_void_p(address))
        self._check(code, "making an IPC handle")
        return bytes(handle)

    def ipc_open(self, handle: bytes) -> int:
        """Map another process's allocation, readable by the current device; returns its address here."""
        address = ctypes.c_void_p()
        code = self._library.cudaIpcOpenMemHandle(
            ctypes.byref(address), _IpcHandle.from_buffer_copy(handle), ctypes.c_uint(_LAZY_PEER_ACCESS)
        )
        self._check(code, "opening an IPC handle")
        return address.value or 0

    def ipc_close(self, address: int) -> None:
        """Take `ipc_open` back."""
        self._check(self._library.cudaIpcCloseMemHandle(ctypes.c_void_p(address)), "closing an IPC handle")

    def copy(self, destinations: I64, sources: I64, num_bytes: I64, stream: int) -> None:
        """Enqueue dense copies between any two memories; returns before they are done.

        Args:
            destinations: Addresses, shape (N,); must stay alive and untouched until the stream has passed.
            sources: Addresses, shape (N,).
            num_bytes: Sizes, shape (N,).
            stream: A stream of its own, never the default one: batches refuse that.
        """
        if self.version >= _BATCH_SINCE:
            self._copy_batch(destinations, sources, num_bytes, stream)
            return
        handle, submit = ctypes.c_void_p(stream), self._library.cudaMemcpyAsync
        for destination, source, size in zip(
            destinations.tolist(), sources.tolist(), num_bytes.tolist(), strict=True
        ):
            code = submit(
                ctypes.c_void_p(destination),
                ctypes.c_void_p(source),
                ctypes.c_size_t(size),
                _DEFAULT_KIND,
                handle,
            )
            self._check(code, f"copying {size} bytes")

    def _copy_batch(self, destinations: I64, sources: I64, num_bytes: I64, stream: int) -> None:
        first = ctypes.c_size_t(0)
        fail = ctypes.c_size_t(0)
        fail_index = () if self.version >= _BATCH_WITHOUT_FAIL_INDEX_SINCE else (ctypes.byref(fail),)
        code = self._library.cudaMemcpyBatchAsync(
            _pointer(destinations), _pointer(sources), _pointer(num_bytes), ctypes.c_size_t(len(num_bytes)),
            self._attributes, ctypes.byref(first), ctypes.c_size_t(1), *fail_index, ctypes.c_void_p(stream),
        )  # fmt: skip
        self._check(code, f"copying {len(num_bytes)} pieces, {int(num_bytes.sum())} bytes")

    def copy_2d(self, columns: npt.NDArray[np.int64], stream: int) -> None:
        """Enqueue strided copies; rows of `columns` are (destination, its pitch, source, its pitch, width, rows)."""
        handle, submit = ctypes.c_void_p(stream), self._library.cudaMemcpy2DAsync
        kinds = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, *(ctypes.c_size_t,) * 3)
        for row in columns.tolist():
            code = submit(
                *(kind(value) for kind, value in zip(kinds, row, strict=True)), _DEFAULT_KIND, handle
            )
            self._check(code, f"copying {row[5]} rows of {row[4]} bytes")

    def _check(self, code: int, doing: str) -> None:
        """Map a return code; the runtime would otherwise hand it to torch's next call as well.

        Raises:
            HeadraceError: The code is not success; the class is the one of `_ERRORS`, else TransportError.
        """
        if code == _SUCCESS:
            return
        self._library.cudaGetLastError()
        kind, way_out = _ERRORS.get(
            code, (TransportError, "see the CUDA error; restart the engine if it stays")
        )
        text = self._library.cudaGetErrorString(code)
        reason = text.decode() if text else "unknown"
        raise kind(f"{doing} failed: CUDA error {code} ({reason}); {way_out}")


def _pointer(values: npt.NDArray[np.int64]) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)


@lru_cache
def cuda_runtime() -> CudaRuntime:
    """Return the runtime library that torch has loaded into this process.

    Raises:
        BackendUnavailableError: torch was built without CUDA, or its runtime cannot be found.
    """
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.partition("/")[2]
        if path.rpartition("/")[2].startswith("libcudart.so"):
            return CudaRuntime(ctypes.CDLL(f"/{path}"))
    message = "no CUDA runtime is loaded in this process; install a torch that is built for CUDA"
    raise BackendUnavailableError(message, name="libcudart")
