"""PagesAhead: memory made ahead of the bytes that come into it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch

from headrace.segments.pages import make_pages

_CHUNK_BYTES = 8 << 20


class PagesAhead:
    """Brings in the pages of writable flat blocks: all by a background thread, some sooner by who needs them.

    Use as a context: the thread has ended when the context has, and nothing is made any more.

    Args:
        blocks: Those of other devices are left alone.
        begin: Called in the thread before anything is made, to set its priority.
    """

    def __init__(self, blocks: Sequence[torch.Tensor], begin: Callable[[], None] | None = None) -> None:
        self._blocks = [block if block.device.type == "cpu" else block[:0] for block in blocks]
        self._begun: set[tuple[int, int]] = set()
        self._huge = True
        self._stopped = False
        self._lock = threading.Lock()
        self._begin = begin
        self._thread = threading.Thread(target=self._run, name="headrace-pages", daemon=True)

    def need(self, block: int, begin: int, end: int) -> None:
        """Bring in the pages of bytes `[begin, end)` that nobody began with. Blocking, without the GIL."""
        for chunk in range(begin // _CHUNK_BYTES, -(-end // _CHUNK_BYTES)):
            self._make(block, chunk)

    def _run(self) -> None:
        if self._begin is not None:
            self._begin()
        for index, block in enumerate(self._blocks):
            for chunk in range(-(-block.numel() // _CHUNK_BYTES)):
                self._make(index, chunk)

    def _make(self, block: int, chunk: int) -> None:
        with self._lock:
            if self._stopped or (block, chunk) in self._begun:
                return
            self._begun.add((block, chunk))
            memory = self._blocks[block][chunk * _CHUNK_BYTES : (chunk + 1) * _CHUNK_BYTES]
        if not make_pages(memory, huge=self._huge):
            self._huge = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._stopped = True
        self._thread.join()
        self._blocks = []
