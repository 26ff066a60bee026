"""The device that a worker's tensors lie on, as a receiver's thread uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WorkerDevice:
    """A CPU, or one GPU with a stream of its own: staging does not wait for what the engine has enqueued.

    Args:
        name: As torch names it, `cpu` or `cuda:0`.
    """

    def __init__(self, name: str) -> None:
        self._device = torch.device(name)
        self._stream: torch.cuda.Stream | None = None

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self._device.type == "cuda"

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Make the device and the receiver's stream the calling thread's current ones."""
        if not self.is_cuda:
            yield
            return
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                yield

    def mark(self) -> torch.cuda.Event | None:
        """Note how far the caller's current stream has got; None on a CPU, where what was called is done."""
        if not self.is_cuda:
            return None
        mark: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return mark

    def follow(self, mark: torch.cuda.Event | None) -> None:
        """Order what the caller's current stream is given from now on after what led to `mark`."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def join(self) -> None:
        """Order what the caller's current stream is given from now on after all of the receiver's."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def settle(self) -> None:
        """Wait until what the current stream was given is done: a reply must not be ahead of the GPU."""
        if self.is_cuda:
            torch.cuda.current_stream(self._device).synchronize()
