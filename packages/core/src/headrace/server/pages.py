"""PagesAhead: memory made ahead of the bytes that it waits for, while holders are reached and the first travel."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

from headrace.segments.host import make_pages

_CHUNK_BYTES = 8 << 20


class PagesAhead:
    """Brings in the pages of writable flat blocks in a background thread once `begin` is called.

    Use as a context: the thread has ended when the context has.
    """

    def __init__(self, blocks: Sequence[torch.Tensor]) -> None:
        self._blocks = [block for block in blocks if block.device.type == "cpu"]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start, once; from any thread."""
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="headrace-pages", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        for block in self._blocks:
            for begin in range(0, block.numel(), _CHUNK_BYTES):
                if self._stop.is_set():
                    return
                make_pages(block[begin : begin + _CHUNK_BYTES])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._stop.set()
        if self._thread is not None:
            self._thread.join()
