"""Mooncake alone, in a process of its own: what `benchmarks.p2p` compares with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.transports.mooncake_process import Answer, serve
from headrace.transports.mooncake_reader import ReaderEngine


class Ceiling(ReaderEngine):
    """Reads one range with Mooncake's own blocking call where it is asked to, and as joiners do otherwise."""

    def __call__(self, request: Mapping[str, Any]) -> Answer:
        """Answer the parent; `blocking` is `(byte of our memory, peer's address, bytes)`."""
        if "blocking" not in request:
            return super().__call__(request)
        own, peer, size = map(int, request["blocking"])
        engine: Any = self._engine._engine
        code = engine.batch_transfer_sync_read(str(request["session"]), [self._staging + own], [peer], [size])
        return {"code": code}


if __name__ == "__main__":
    serve(Ceiling)
