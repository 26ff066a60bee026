"""Memory made ahead of the bytes that it waits for, while holders are reached and the first of them travel."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from headrace.segments.host import make_pages

_CHUNK_BYTES = 8 << 20


@contextmanager
def pages_ahead(blocks: Sequence[torch.Tensor]) -> Iterator[None]:
    """Bring in the pages of writable flat blocks in a background thread; it has ended when the context has."""
    stop = threading.Event()

    def run() -> None:
        for block in blocks:
            for begin in range(0, block.numel() if block.device.type == "cpu" else 0, _CHUNK_BYTES):
                if stop.is_set():
                    return
                make_pages(block[begin : begin + _CHUNK_BYTES])

    thread = threading.Thread(target=run, name="headrace-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
