"""RingPipeline: every stage works on its own bucket at the same time, as far as free slots allow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.errors import TransferTimeoutError, TransportClosedError
from headrace.telemetry import Recorder

ALIVE_S = 0.1


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """One thing done to every bucket, in ascending order: `run(bucket, slot)` blocks until it is done."""

    name: str
    run: Callable[[int, int], None]


class RingPipeline:
    """Runs stages in threads ahead of a consumer, which takes buckets in order and gives their slots back.

    Bucket `b` lives in slot `b % depth`. Stage `s` starts on bucket `b` when stage `s - 1` has done it, the first
    stage when bucket `b - depth` was released. So `depth == num_buckets` stages everything, `depth == 1` is serial,
    and anything between overlaps.

    Call order: 1. `start`. 2. `wait_ready(b)`, use slot, `release(b)`, for b ascending. 3. `close`, also after errors.
    The first exception of a stage stops all stages and is raised by the consumer's next call.
    """

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        num_buckets: int,
        depth: int,
        recorder: Recorder,
        bucket_bytes: Sequence[int] = (),
    ) -> None:
        self._stages = tuple(stages)
        self._num_buckets = num_buckets
        self._depth = depth
        self._recorder = recorder
        self._bucket_bytes = list(bucket_bytes) or [0] * num_buckets
        self._done = [0] * (len(self._stages) + 1)
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start one daemon thread per stage; returns at once."""
        for position, stage in enumerate(self._stages):
            thread = threading.Thread(
                target=self._work, args=(position,), name=f"headrace-{stage.name}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def wait_ready(self, bucket: int, deadline_s: float, alive: Callable[[], None] = lambda: None) -> int:
        """Wait until every stage has done `bucket`; returns its slot.

        Args:
            bucket: Which one.
            deadline_s: Limit.
            alive: Called now and then while waiting; may raise to break the wait off.

        Raises:
            TransferTimeoutError: Not within the deadline; names the stage that it waits for.
            Exception: What a stage raised.
        """
        limit = time.monotonic() + deadline_s
        with self._changed:
            while self._done[len(self._stages) - 1] <= bucket:
                self._raise_failure()
                alive()
                left = limit - time.monotonic()
                if left <= 0:
                    raise TransferTimeoutError(self._late(bucket, deadline_s), phase="pipeline")
                self._changed.wait(min(left, ALIVE_S))
        return bucket % self._depth

    def release(self, bucket: int) -> None:
        """Give the slot of `bucket` back; buckets are released in ascending order."""
        self._advance(len(self._stages), bucket + 1)

    @property
    def depth(self) -> int:
        """Number of slots."""
        return self._depth

    def close(self, deadline_s: float = 5.0) -> bool:
        """Stop the stages and wait for their threads; idempotent. A stage that is inside a call ends after it.

        Returns whether all have ended.
        """
        with self._changed:
            self._failure = self._failure or TransportClosedError("the pipeline was closed")
            self._changed.notify_all()
        limit = time.monotonic() + deadline_s
        for thread in self._threads:
            thread.join(max(0.0, limit - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        # A raised failure's traceback refers back to here: the cycle would keep slots in memory.
        self._failure = TransportClosedError("the pipeline was closed")
        return True

    def _work(self, position: int) -> None:
        stage = self._stages[position]
        try:
            for bucket in range(self._num_buckets):
                if not self._wait_turn(position, bucket):
                    return
                with self._recorder.span(stage.name, self._bucket_bytes[bucket]):
                    stage.run(bucket, bucket % self._depth)
                self._advance(position, bucket + 1)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _wait_turn(self, position: int, bucket: int) -> bool:
        before = position - 1 if position else len(self._stages)
        needed = bucket + 1 if position else bucket - self._depth + 1
        with self._changed:
            while self._done[before] < needed and self._failure is None:
                self._changed.wait()
            return self._failure is None

    def _advance(self, position: int, count: int) -> None:
        with self._changed:
            self._done[position] = count
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _late(self, bucket: int, deadline_s: float) -> str:
        slowest = next(s for s, stage in enumerate(self._stages) if self._done[s] <= bucket)
        return (
            f"bucket {bucket} of {self._num_buckets} was not ready after {deadline_s:.1f} s: "
            f"stage {self._stages[slowest].name!r} has done {self._done[slowest]}"
        )
