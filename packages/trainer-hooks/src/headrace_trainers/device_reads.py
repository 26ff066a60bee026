"""A rank's shards, copied out by its GPUs on streams of their own, beside what training has them do.

Two kinds of events order it, and no thread waits in between:

- *written*: recorded on the training thread's stream when all work that makes a step's weights was given to the GPU.
  The copies' streams wait for it before they read.
- *copied*: recorded on each of the copies' streams behind the last copy. The training thread's stream waits for it
  before the next step's writes; whoever publishes the version, before it is whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from headrace.errors import TransferTimeoutError
from headrace_trainers.batches import Batch, Form, Target, batches_of, form_of

SCRATCH_BYTES = 64 << 20
"""Of a GPU's memory, whatever the size of the shards; kept between updates."""
_LANES = 2
_POLL_S = 2e-4


class Event(Protocol):
    """A mark in a stream: `query` says whether all before it is done."""

    def query(self) -> bool:
        """Return whether all before it is done."""
        ...


class Lane(Protocol):
    """A stream and its part of the scratch, on one device.

    What a lane is given runs in order, so a batch comes into the scratch when the one before it is out. Two lanes take
    turns: one gathers while the other copies out.
    """

    @property
    def scratch(self) -> torch.Tensor:
        """Flat uint8 memory of the device, the lane's own."""
        ...

    def wait_event(self, event: Event) -> None:
        """Have all that the lane is given from now on come after an event."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Have `work` enqueue on the lane's stream."""
        ...

    def record_event(self) -> Event:
        """Return a mark behind all that the lane was given."""
        ...


class CudaLane:
    """A lane of a GPU.

    Args:
        device: The GPU.
        num_bytes: Size of the scratch.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        # The lowest priority that there is; training's streams have the same or a higher one.
        self._stream = torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self.scratch = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def wait_event(self, event: Event) -> None:
        """Have all that the lane is given from now on come after an event of torch's."""
        self._stream.wait_event(event)  # type: ignore[arg-type]

    def run(self, work: Callable[[], None]) -> None:
        """Have `work` enqueue on the lane's stream, with the lane's device as the current one."""
        with torch.cuda.stream(self._stream):
            work()

    def record_event(self) -> torch.cuda.Event:
        """Return a mark behind all that the lane was given."""
        event: torch.cuda.Event = self._stream.record_event()
        return event


@dataclass(frozen=True)
class Job:
    """A tensor to copy out.

    Attributes:
        local: Returns it.
        target: Where it goes.
        is_computed: Whether `local` computes it, on the current stream.
    """

    local: Callable[[], torch.Tensor]
    target: Target
    is_computed: bool = False


class DeviceCopier:
    """Copies tensors of one device out of it. Thread-safe.

    Args:
        device: The device.
        make_lane: Makes a lane of so many bytes.
        scratch_bytes: Of the device's memory, over all lanes.
    """

    def __init__(
        self,
        device: torch.device,
        make_lane: Callable[[torch.device, int], Lane] = CudaLane,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        self._lanes = [make_lane(device, scratch_bytes // _LANES) for _ in range(_LANES)]
        self._lock = threading.Lock()
        self._key: tuple[list[Form], list[Target]] = ([], [])
        self._batches: list[Batch] = []

    def submit(
        self, jobs: Sequence[Job], segments: Sequence[torch.Tensor], written: Event | None
    ) -> tuple[list[Event], list[torch.Tensor]]:
        """Enqueue copies of all jobs, to run after `written`; returns before they are done.

        Returns:
            Marks behind them, and tensors that must stay alive until all marks are reached.
        """
        with self._lock, torch.no_grad():
            if written is not None:
                for lane in self._lanes:
                    lane.wait_event(written)
            held = [job for job in jobs if not job.is_computed]
            tensors = [job.local() for job in held]
            batches = self._known_batches([form_of(t) for t in tensors], [job.target for job in held])
            for number, batch in enumerate(batches):
                self._lanes[number % _LANES].run(_bound(batch, tensors, segments))
            for number, job in enumerate(job for job in jobs if job.is_computed):
                lane = self._lanes[number % _LANES]
                lane.run(_computing(job, lane.scratch, segments))
            return [lane.record_event() for lane in self._lanes], tensors

    def _known_batches(self, forms: list[Form], targets: list[Target]) -> list[Batch]:
        """Return batches, the same as last time where nothing has changed."""
        if (forms, targets) != self._key:
            self._key = (forms, targets)
            self._batches = batches_of(forms, targets, [lane.scratch for lane in self._lanes])
        return self._batches


def _bound(batch: Batch, tensors: Sequence[torch.Tensor], segments: Sequence[torch.Tensor]) -> Callable[[], None]:
    return lambda: batch.run(tensors, segments)


def _computing(job: Job, scratch: torch.Tensor, segments: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Return what computes one tensor and copies it out, so that no two such tensors exist at once on a lane."""

    def work() -> None:
        tensor = job.local()
        for batch in batches_of([form_of(tensor)], [job.target], [scratch]):
            batch.run([tensor], segments)

    return work


def wait_events(events: Iterable[Event], deadline_s: float, doing: str) -> None:
    """Wait until all events are reached.

    Raises:
        TransferTimeoutError: Not within the deadline.
    """
    limit = time.monotonic() + deadline_s
    for event in events:
        while not event.query():
            if time.monotonic() > limit:
                message = f"{doing} did not end within {deadline_s:.1f} s; is the GPU still at work?"
                raise TransferTimeoutError(message, phase="read", retryable=True)
            time.sleep(_POLL_S)


def hold_back(events: Mapping[torch.device, Sequence[Event]]) -> None:
    """Have what this thread's current streams are given from now on come after torch's events of their devices."""
    for device, marks in events.items():
        stream = torch.cuda.current_stream(device)
        for mark in marks:
            stream.wait_event(mark)  # type: ignore[arg-type]
