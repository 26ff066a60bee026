"""Mooncake's Transfer Engine behind typed calls, its return codes as errors. Only helper processes load it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import struct
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from headrace.errors import (
    BackendUnavailableError,
    ConnectError,
    HeadraceError,
    PeerLostError,
    RemoteProtocolError,
)
from headrace.mapping import MappedMemory

BATCH_ENTRIES = 1024
DIRECTORY_BYTES = 1 << 18
TRANSFER_TIMEOUT_S = 30
_UNDER_WAY, _DONE = 0, 1
_LEAST_SLEEP_S, _MOST_SLEEP_S = 2e-4, 5e-3
_HEADER = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<32sQQ")
_MAGIC = b"HDRD"

CODES: Mapping[int, type[HeadraceError]] = {-1: PeerLostError, -2: PeerLostError}
"""What Mooncake's calls return when they fail: -1 is a dead peer, refused memory or a time-out, -2 a time-out."""


def require_mooncake() -> None:
    """Check that Mooncake can be loaded, without loading it.

    Raises:
        BackendUnavailableError: It is not installed, or a system library is missing; says how to get it.
    """
    if importlib.util.find_spec("mooncake") is None:
        message = (
            "Mooncake is not installed; pip install 'headrace[p2p]', or mooncake-transfer-engine-non-cuda"
        )
        raise BackendUnavailableError(message, name="mooncake")
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError as error:
        message = f"Mooncake needs the system library libibverbs ({error}); apt-get install libibverbs1"
        raise BackendUnavailableError(message, name="mooncake") from error


def missing() -> str:
    """Return why Mooncake cannot be loaded here, and the way out; empty where it can."""
    try:
        require_mooncake()
    except BackendUnavailableError as error:
        return str(error)
    return ""


def helper_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a helper process: errors only in its log, transfers that end, connections that stay.

    One connection to a peer takes one transfer after another, so there is no pause between them, and each ends as early
    as it can. Whoever starts the process may choose otherwise. What waits is not refused, as Mooncake would more than
    1,024.
    """
    connections = {"MC_TCP_ENABLE_CONNECTION_POOL": "1", "MC_TCP_LANES_PER_PEER": "1"}
    fixed = {
        "MC_LOG_LEVEL": "ERROR",
        "GLOG_minloglevel": "3",
        "MC_TRANSFER_TIMEOUT": str(TRANSFER_TIMEOUT_S),
        "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    }
    return {**connections, **own, **fixed}


def check(code: int, what: str) -> None:
    """Raise what a return code means.

    Raises:
        HeadraceError: Of the class that `CODES` says.
        RemoteProtocolError: The code is not known.
    """
    if code == 0:
        return
    kind = CODES.get(code)
    if kind is None:
        message = f"{what} ended with {code}, which no known version of Mooncake returns"
        raise RemoteProtocolError(message, name="mooncake")
    message = f"{what} failed: the peer is gone, hangs, or does not hold the memory any more"
    raise kind(message, name="mooncake")


class Mooncake:
    """One Transfer Engine of this process.

    Args:
        host: Address under which peers reach this process.
        nics: RDMA devices to use; empty for TCP.

    Raises:
        BackendUnavailableError: It cannot be loaded or started.
    """

    def __init__(self, host: str, nics: Sequence[str] = ()) -> None:
        require_mooncake()
        try:
            self._engine: Any = _load().TransferEngine()
        except ImportError as error:
            message = f"Mooncake cannot be loaded: {error}; pip install 'headrace[p2p]', apt-get install libibverbs1"
            raise BackendUnavailableError(message, name="mooncake") from error
        self.uses_rdma = bool(nics)
        protocol = "rdma" if nics else "tcp"
        code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, ",".join(nics))
        if code != 0:
            message = f"Mooncake did not start on {host} over {protocol} {','.join(nics)}: it returned {code}"
            raise BackendUnavailableError(message, name="mooncake")
        self.session = f"{host}:{self._engine.get_rpc_port()}"

    def register(self, address: int, num_bytes: int) -> None:
        """Let peers read memory of this process (and, as Mooncake has no rights, write what is mapped writable)."""
        check(self._engine.register_memory(address, num_bytes), f"registering {num_bytes} bytes")

    def unregister(self, address: int) -> None:
        """Take memory back; peers that read it fail."""
        check(self._engine.unregister_memory(address), "taking memory back")

    def first_address(self, session: str) -> int:
        """Return where a peer's first registered memory lies.

        Raises:
            ConnectError: The peer cannot be reached, or has registered nothing.
        """
        address = int(self._engine.get_first_buffer_address(session))
        if not address:
            message = f"Mooncake at {session} cannot be reached; does its holder still run?"
            raise ConnectError(message, name=session)
        return address

    def read(self, session: str, entries: Sequence[tuple[int, int, int]]) -> None:
        """Read `(own address, peer's address, bytes)`. Blocking, without the GIL and without spinning.

        Mooncake's own wait spins a core, which the sender lacks on a small machine; so every entry is a batch of its
        own, whose state is asked for at intervals that grow with the wait.

        Raises:
            PeerLostError: The peer is gone, hangs, or does not hold that memory; late bytes may still land.
        """
        for begin in range(0, len(entries), BATCH_ENTRIES):
            chosen = entries[begin : begin + BATCH_ENTRIES]
            what = f"a read of {sum(size for *_, size in chosen)} bytes from {session}"
            batches = [
                self._engine.batch_transfer_async_read(session, [own], [peer], [size])
                for own, peer, size in chosen
            ]
            check(0 if all(batches) else -1, what)
            self._await(batches, what)

    def _await(self, batches: Sequence[int], what: str) -> None:
        start = time.monotonic()
        for batch in batches:
            while (state := self._engine.transfer_check_status(batch)) == _UNDER_WAY:
                waited_s = time.monotonic() - start
                if waited_s > TRANSFER_TIMEOUT_S:
                    check(-1, what)
                time.sleep(min(max(waited_s / 8, _LEAST_SLEEP_S), _MOST_SLEEP_S))
            if state != _DONE:
                check(state, what)


def _load() -> ModuleType:
    """Import the engine, which starts threads, without Mooncake's store, which its package would load."""
    spec = importlib.util.find_spec("mooncake")
    if spec is not None:
        sys.modules.setdefault("mooncake", importlib.util.module_from_spec(spec))
    return importlib.import_module("mooncake.engine")


def map_memory(fd: int, num_bytes: int, *, writable: bool, private: bool = False) -> MappedMemory:
    """Map a descriptor; see MappedMemory.

    Raises:
        BackendUnavailableError: The kernel refuses.
    """
    try:
        return MappedMemory(fd, num_bytes, writable=writable, private=private)
    except OSError as error:
        message = f"{num_bytes} bytes cannot be mapped for Mooncake: {error.strerror}"
        raise BackendUnavailableError(message, name="mooncake") from error


def encode_directory(generation: int, segments: Mapping[str, tuple[int, int]]) -> bytes:
    """Return a directory: where each segment lies, behind a checksum, as readers may look while it is written."""
    body = b"".join(_ENTRY.pack(name.encode(), *place) for name, place in segments.items())
    if _HEADER.size + len(body) > DIRECTORY_BYTES:
        message = f"{len(segments)} segments do not fit into Mooncake's directory; use larger segments"
        raise BackendUnavailableError(message, name="mooncake")
    return _HEADER.pack(_MAGIC, len(segments), generation, zlib.crc32(body)) + body


def decode_directory(data: bytes) -> dict[str, tuple[int, int]] | None:
    """Return address and size of each segment, or None where the directory was being written.

    Raises:
        RemoteProtocolError: It is no directory of ours.
    """
    magic, count, _, checksum = _HEADER.unpack_from(data)
    end = _HEADER.size + count * _ENTRY.size
    if magic != _MAGIC or end > len(data):
        message = "what runs there is Mooncake, but no holder of headrace"
        raise RemoteProtocolError(message, name="mooncake")
    body = data[_HEADER.size : end]
    if zlib.crc32(body) != checksum:
        return None
    entries = (_ENTRY.unpack_from(body, at) for at in range(0, len(body), _ENTRY.size))
    return {name.rstrip(b"\0").decode("ascii", "replace"): (address, size) for name, address, size in entries}
