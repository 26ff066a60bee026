"""Page-locking of mapped memory, chunk by chunk, so that an engine that serves meanwhile is not held up."""

from __future__ import annotations

import logging
from collections.abc import Callable

from headrace.errors import HeadraceError
from headrace.segments.cudart import cuda_runtime

logger = logging.getLogger(__name__)

PIN_CHUNK_BYTES = 64 << 20
"""Bytes page-locked at a time. One copy of a copy engine must not cross from one chunk into the next."""


class PinnedRange:
    """Mapped memory that GPUs may read directly, until `close`. The mapping must outlive it.

    Args:
        address: First byte, on a page boundary.
        num_bytes: Size.
        between: Called after each chunk; may sleep, may raise to stop.
        chunk_bytes: Bytes page-locked at a time; a copy must not cross from one chunk into the next.
        writable: Whether GPUs write there, too.

    Raises:
        CapacityError: A limit on locked memory; nothing stays locked.
        BackendUnavailableError: The driver cannot page-lock it; nothing stays locked.
    """

    def __init__(
        self,
        address: int,
        num_bytes: int,
        between: Callable[[], None] | None = None,
        *,
        chunk_bytes: int = PIN_CHUNK_BYTES,
        writable: bool = False,
    ) -> None:
        self._chunks: list[int] = []
        try:
            for begin in range(address, address + num_bytes, chunk_bytes):
                size = min(chunk_bytes, address + num_bytes - begin)
                cuda_runtime().register(begin, size, writable=writable)
                self._chunks.append(begin)
                if between is not None:
                    between()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock everything; idempotent. No copy may be reading it any more."""
        while self._chunks:
            try:
                cuda_runtime().unregister(self._chunks.pop())
            except HeadraceError as error:
                logger.warning("page-locked memory could not be given back: %s", error)
