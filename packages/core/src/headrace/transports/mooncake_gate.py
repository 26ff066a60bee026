"""The holder's Mooncake helper: read-only mappings of lent segments, and a directory of where they lie."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.errors import ConnectError
from headrace.mapping import MappedMemory
from headrace.transports.mooncake_engine import (
    DIRECTORY_BYTES,
    Mooncake,
    encode_directory,
    map_memory,
)
from headrace.transports.mooncake_process import Answer, HelperProcess, serve

if TYPE_CHECKING:
    from headrace.config import HostSettings

_SHOW_S = 300.0


class Shown(NamedTuple):
    """A segment as its holder hands it to the helper: name, size, descriptor in the holder's process."""

    segment_id: str
    num_bytes: int
    fd: int


class Gate:
    """Serves segments of this process, in a process of its own. Lives in the holder.

    Mooncake checks nobody and can write as well as read. So the helper has the segments mapped read-only (where the
    NIC insists on writable memory, copies of its own), and nothing else of the holder: a peer that writes is refused
    by the kernel, and readers compare sums in any case.

    Args:
        host: Address to advertise.
    """

    def __init__(self, host: HostSettings) -> None:
        settings = {"host": host.require_advertised(), "nics": list(host.mooncake_nics)}
        self._helper = HelperProcess(__name__, settings, cpus=host.mooncake_cpus)
        self.endpoint = str(self._helper.ready["session"])

    def show(self, segments: Sequence[Shown]) -> None:
        """Serve exactly these segments of this process from now on. Blocking.

        Raises:
            HeadraceError: A segment cannot be mapped or registered.
        """
        self._helper.call({"pid": os.getpid(), "segments": [tuple(one) for one in segments]}, _SHOW_S)

    def close(self) -> None:
        """Serve nothing any more; idempotent."""
        self._helper.close()


class GateEngine:
    """What the helper does: an engine, a directory, mappings. Call order: 1. construct. 2. `show`, again and again."""

    def __init__(self, host: str, nics: Sequence[str] = ()) -> None:
        self._engine = Mooncake(host, nics)
        self.facts = {"session": self._engine.session}
        self._directory = map_memory(-1, DIRECTORY_BYTES, writable=True)
        self._engine.register(self._directory.address, DIRECTORY_BYTES)
        self._mapped: dict[str, MappedMemory] = {}
        self._shown: dict[str, tuple[int, int]] = {}
        self._generation = 0
        self._write()

    def __call__(self, request: Mapping[str, Any]) -> Answer:
        """Answer the holder."""
        self.show(int(request["pid"]), [Shown(*one) for one in request["segments"]])
        return {}

    def show(self, pid: int, segments: Sequence[Shown]) -> None:
        """Serve exactly these segments of process `pid`."""
        wanted = {one.segment_id: one for one in segments}
        for name in self._shown.keys() - wanted.keys():
            address, _ = self._shown.pop(name)
            self._write()
            self._engine.unregister(address)
            del self._mapped[name]
        for name in wanted.keys() - self._shown.keys():
            self._mapped[name] = self._map(pid, wanted[name])
            address, size = self._mapped[name].address, wanted[name].num_bytes
            self._engine.register(address, size)
            self._shown[name] = (address, size)
        self._write()

    def _map(self, pid: int, segment: Shown) -> MappedMemory:
        """Map a segment by way of a descriptor that can only read."""
        path = f"/proc/{pid}/fd/{segment.fd}"
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            message = f"segment {segment.segment_id} cannot be opened as {path}: {error}"
            raise ConnectError(message, name=segment.segment_id) from error
        try:
            own = self._engine.uses_rdma
            return map_memory(fd, segment.num_bytes, writable=own, private=own)
        finally:
            os.close(fd)

    def _write(self) -> None:
        self._generation += 1
        data = encode_directory(self._generation, self._shown)
        ctypes.memmove(self._directory.address, data, len(data))


def main() -> None:
    """Run the helper."""
    serve(lambda settings: GateEngine(settings["host"], settings["nics"]))


if __name__ == "__main__":
    main()
