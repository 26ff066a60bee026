"""The reader's Mooncake helper: reads ranges of peers into staging memory that is shared with its parent."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from typing import Any

from headrace.errors import ConnectError, PeerLostError
from headrace.mapping import MappedMemory
from headrace.transports.mooncake_engine import (
    DIRECTORY_BYTES,
    Mooncake,
    decode_directory,
    map_memory,
)
from headrace.transports.mooncake_process import Answer, serve

_LOOKS = 20


class ReaderEngine:
    """What the helper does: looks into holders' directories, and reads."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._engine = Mooncake(settings["host"], settings["nics"])
        self.facts = {"session": self._engine.session}
        self._memory = map_memory(int(settings["fd"]), int(settings["num_bytes"]), writable=True)
        self._staging = self._memory.address
        self._scratch: list[MappedMemory] = []
        self._engine.register(self._staging, int(settings["num_bytes"]))

    def __call__(self, request: Mapping[str, Any]) -> Answer:
        """Answer the parent: `look` returns a directory, `read` reads ranges."""
        session = str(request["session"])
        if "ranges" not in request:
            return {"segments": self._look(session)}
        ranges = struct.iter_unpack("=qqq", request["ranges"])
        self._engine.read(session, [(self._staging + own, peer, size) for own, peer, size in ranges])
        return {}

    def _look(self, session: str) -> dict[str, tuple[int, int]]:
        """Return where a holder's segments lie; the memory that is read into is of this look alone, for ever."""
        try:
            first = self._engine.first_address(session)
            memory = map_memory(-1, DIRECTORY_BYTES, writable=True)
            self._scratch.append(memory)
            scratch = memory.address
            self._engine.register(scratch, DIRECTORY_BYTES)
            for _ in range(_LOOKS):
                self._engine.read(session, [(scratch, first, DIRECTORY_BYTES)])
                found = decode_directory(ctypes.string_at(scratch, DIRECTORY_BYTES))
                if found is not None:
                    self._engine.unregister(scratch)
                    return found
        except PeerLostError as error:
            raise ConnectError(str(error), name=session) from error
        message = f"the directory of Mooncake at {session} never stood still; try again"
        raise ConnectError(message, name=session)


def main() -> None:
    """Run the helper."""
    serve(ReaderEngine)


if __name__ == "__main__":
    main()
