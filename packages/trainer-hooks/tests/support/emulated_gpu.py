"""Streams as a GPU has them, in host memory: threads that run what they are given in order, while the giver goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch

from headrace_trainers.device_reads import Event
from headrace_trainers.source import ShardSource

DEVICE = torch.device("cpu")


class Mark:
    """An event: reached when its stream comes to it."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def query(self) -> bool:
        return self.reached.is_set()


class Stream:
    """Runs work in order, in a thread of its own. Also a lane: a stream with its part of the scratch."""

    made: ClassVar[list[Stream]] = []

    def __init__(self, _device: torch.device = DEVICE, num_bytes: int = 0) -> None:
        self.scratch = torch.zeros(num_bytes, dtype=torch.uint8)
        self._work: queue.Queue[Callable[[], None]] = queue.Queue()
        threading.Thread(target=self._loop, daemon=True).start()
        Stream.made.append(self)

    def _loop(self) -> None:
        with torch.no_grad():
            while True:
                self._work.get()()

    def run(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Mark)
        self.run(lambda: _wait(event))

    def record_event(self) -> Mark:
        mark = Mark()
        self.run(mark.reached.set)
        return mark

    def block(self) -> threading.Event:
        """Have the stream stand still until the event that is returned is set."""
        go_on = threading.Event()
        self.run(lambda: _must(go_on.wait(60)))
        return go_on


def _wait(mark: Mark) -> None:
    _must(mark.reached.wait(60))


def _must(came: bool) -> None:
    assert came, "a stream stood still for a minute"


class EmulatedGpuSource(ShardSource):
    """A ShardSource whose shards lie on a GPU that this host emulates.

    Attributes:
        training: The stream on which the trainer's own work runs.
    """

    device_type = "cpu"
    make_lane = Stream

    def start(self) -> EmulatedGpuSource:
        self.training = Stream()
        self.mark_written()
        return self

    def mark_written(self) -> None:
        self._written[DEVICE] = self.training.record_event()

    def hold_back(self, copied: Mapping[torch.device, Sequence[Event]]) -> None:
        for marks in copied.values():
            for mark in marks:
                self.training.wait_event(mark)
