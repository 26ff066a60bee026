"""The ceiling of TCP on this machine: every worker at once reads a plain stream into touched memory."""

from __future__ import annotations

import socket
import threading
import time

import torch

from headrace.protocols import InferenceBackend
from headrace.testing.bare_engine import BareEngine

_CHUNK_BYTES = 4 << 20
_DEADLINE_S = 60.0


def stream_seconds(engine: BareEngine, source: torch.Tensor, num_bytes: int) -> float:
    """Send `num_bytes` of `source` to every worker at once, over loopback; returns the slowest worker's time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_DEADLINE_S)
        view = source[:num_bytes].numpy().data
        senders = [threading.Thread(target=_send, args=(listener, view)) for _ in range(engine.world_size)]
        for sender in senders:
            sender.start()
        seconds = engine.call_all(_receive, listener.getsockname()[1], num_bytes)
        for sender in senders:
            sender.join(_DEADLINE_S)
    return float(max(seconds))


def _send(listener: socket.socket, view: memoryview) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(_DEADLINE_S)
        connection.sendall(view)


def _receive(_backend: InferenceBackend, _receiver: object, port: int, num_bytes: int) -> float:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with socket.create_connection(("127.0.0.1", port), timeout=_DEADLINE_S) as connection:
        begin, left = time.monotonic(), num_bytes
        while left:
            taken = connection.recv_into(buffer[: min(left, _CHUNK_BYTES)])
            if not taken:
                raise ConnectionError("the stream ended early")
            left -= taken
        return time.monotonic() - begin
