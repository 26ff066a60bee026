"""Reading a source into memory: in several threads, and only on cores that nothing else wants."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import torch

from headrace.errors import TransferTimeoutError
from headrace.futures import wait_ended
from headrace.protocols import Slot, SourceRegion, WeightSource
from headrace.segments.ahead import PagesAhead
from headrace.store.layout import Layout

_TICK_S = 0.1
_END_S = 10.0
_COMPETING_NICE = 10
# Small: a reader that gets no core any more keeps what it has begun.
_TASK_BYTES = 8 << 20
_PACE_S = 2.0
_STARVED_SHARE = 0.05
Progress = Callable[[int, int], None]


def _give_way() -> None:
    """Have this thread run, for good, only on cores that nothing else wants: an engine or trainer goes before readers.

    Where the kernel forbids it, at the lowest priority; on Linux a niceness is a thread's own. The kernel counts a core
    with idle threads alone as free, so that what wakes up is not put beside an engine's thread.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _compete() -> None:
    """Give this thread, for good, a tenth of a core that others keep busy; less where this process was to have less."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(_COMPETING_NICE, os.getpriority(os.PRIO_PROCESS, thread)))


class Reading:
    """One pass over a source into memory.

    Args:
        source: What to read.
        layout: Where each region of it goes.
        blocks: The memory, flat bytes, in the layout's order.
    """

    def __init__(self, source: WeightSource, layout: Layout, blocks: Sequence[torch.Tensor]) -> None:
        self._source = source
        self._layout = layout
        self._blocks = blocks
        self._stop = threading.Event()
        self._done_bytes = 0
        self._lock = threading.Lock()
        self._futures: list[Future[None]] = []
        self._tasks: deque[list[Slot]] = deque()
        self._cores = _Cores()

    def run(self, num_threads: int, progress: Progress | None, end: float) -> None:
        """Read everything, giving way; on the first failure the others stop after the region they are at."""
        cut = getattr(self._source, "reads_parts", False)
        self._tasks = deque(self._layout.tasks(cut=cut, task_bytes=_TASK_BYTES))
        with PagesAhead(self._blocks, _give_way) as self._memory:
            self._run(num_threads, progress, end)

    def _run(self, num_threads: int, progress: Progress | None, end: float) -> None:
        readers = ThreadPoolExecutor(num_threads, "headrace-read", initializer=self._begin_reader)
        competing = ThreadPoolExecutor(num_threads, "headrace-compete", initializer=_compete)
        try:
            self._futures = [readers.submit(self._read_tasks) for _ in range(num_threads)]
            while self._step(progress, end):
                if self._cores.are_denied():
                    self._futures += [competing.submit(self._read_tasks) for _ in range(num_threads)]
        finally:
            self._stop.set()
            for pool in (readers, competing):
                pool.shutdown(wait=False, cancel_futures=True)
            wait_ended(self._futures, max(0.0, min(end - time.monotonic(), _END_S)))

    def forget(self) -> bool:
        """Let go of the memory and of what readers returned or raised; returns whether none is at work any more."""
        is_idle = all(future.done() for future in self._futures)
        self._futures, self._blocks = [], ()
        return is_idle

    def _step(self, progress: Progress | None, end: float) -> bool:
        """Wait for a moment, tell how far it is and raise what readers raised; returns whether any is at work."""
        finished, pending = wait(self._futures, timeout=_TICK_S, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
        total = self._layout.num_bytes
        if progress is not None:
            progress(self._done_bytes, total)
        if pending and time.monotonic() > end:
            message = f"reading stopped at {self._done_bytes} of {total} bytes: the deadline has passed"
            raise TransferTimeoutError(message, phase="publish", retryable=True)
        return bool(pending)

    def _begin_reader(self) -> None:
        _give_way()
        self._cores.watch()

    def _read_tasks(self) -> None:
        while not self._stop.is_set():
            try:
                task = self._tasks.popleft()
            except IndexError:
                return
            self._read(task)

    def _read(self, task: list[Slot]) -> None:
        for slot in task:
            if self._stop.is_set():
                return
            if slot.num_bytes:
                self._memory.need(slot.segment, slot.begin, slot.begin + slot.num_bytes)
                target = self._blocks[slot.segment][slot.begin : slot.begin + slot.num_bytes]
                self._source.read(SourceRegion(slot.region.name, slot.region.box), target.numpy().data)
            with self._lock:
                self._done_bytes += slot.num_bytes


class _Cores:
    """Watches how much of a core the threads of a reading get that give way."""

    def __init__(self) -> None:
        self._clocks: list[int] = []
        self._begin_s, self._had_s = time.monotonic(), 0.0
        self._said = False

    def watch(self) -> None:
        """Count the calling thread, which lives as long as `are_denied` is called."""
        self._clocks.append(time.pthread_getcpuclockid(threading.get_ident()))

    def are_denied(self) -> bool:
        """Return, once, whether all threads together had next to nothing of late; a slow disk looks the same."""
        seconds = time.monotonic() - self._begin_s
        if self._said or seconds < _PACE_S:
            return False
        had_s = sum(map(time.clock_gettime, self._clocks))
        self._said = had_s - self._had_s < _STARVED_SHARE * seconds
        self._begin_s, self._had_s = self._begin_s + seconds, had_s
        return self._said
