"""How bytes come to this worker, by route: what is done while the engine serves, and what is left for the pause."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from headrace.errors import ApplyError, TransferTimeoutError
from headrace.manifest import HolderAddress
from headrace.pipeline import PipelineStage, RingPipeline
from headrace.plan import TransferPlan
from headrace.receiver.buckets import Bucket, Differences, bounds_of, bucket_of
from headrace.receiver.feeds import Feed
from headrace.receiver.mapped import Mappings
from headrace.telemetry import Recorder

logger = logging.getLogger(__name__)
STAGE_COPY_S = 60.0


class Delivery(Protocol):
    """One plan's way into live tensors. Call order: 1. `stage`. 2. `commit`, again after a failure. 3. `close`."""

    def stage(self, deadline_s: float) -> None:
        """Fetch what can be fetched before the pause; live tensors are not touched."""
        ...

    def commit(self, deadline_s: float, writing: Callable[[], None], *, compare: bool) -> None:
        """Write every live byte; with `compare`, also check each against its source.

        `writing` is called right before the first live byte changes.

        Raises:
            IntegrityError: `compare` found different bytes.
        """
        ...

    def close(self) -> None:
        """Release what staging took; idempotent."""
        ...


class DirectDelivery:
    """Copies from mapped holder memory into live tensors: straight, or by way of a buffer."""

    def __init__(
        self,
        plan: TransferPlan,
        holders: Sequence[HolderAddress],
        memory: Mappings,
        blocks: list[torch.Tensor],
        differences: Differences,
        recorder: Recorder,
    ) -> None:
        self._plan = plan
        self._holders = holders
        self._memory = memory
        self._blocks = blocks
        self._differences = differences
        self._recorder = recorder
        self._buckets: list[Bucket] = []

    def stage(self, deadline_s: float) -> None:
        """Map the holders' segments, touch or page-lock them in chunks, and build the copies' views."""
        on_gpu = any(block.is_cuda for block in self._blocks)
        with self._recorder.span("map"):
            self._memory.open(self._plan, self._holders, deadline_s, pin=on_gpu)
        with self._recorder.span("build"):
            self._buckets = self._memory.bind(self._plan, self._blocks)
        with self._recorder.span("stage"):
            for bucket in self._buckets:
                bucket.run_early(deadline_s)

    def commit(self, deadline_s: float, writing: Callable[[], None], *, compare: bool) -> None:
        """Run the copies; absolute, so it may be repeated."""
        limit = time.monotonic() + deadline_s
        writing()
        for bucket in self._buckets:
            left = check_deadline(limit, deadline_s)
            with self._recorder.span("copy", bucket.num_bytes):
                bucket.live.run()
                bucket.live.finish(left)
        if compare:
            with self._recorder.span("verify"):
                for bucket in self._buckets:
                    self._differences.check(bucket)

    def close(self) -> None:
        """Forget the copies; mappings and what is bound to them stay for the next version."""
        self._buckets = []


class RingDelivery:
    """Copies out of a ring of slots that a feed fills: TCP reads, or a broadcast by a holder of this host.

    With a slot per bucket everything is fetched while the engine serves. With fewer, the ring is full when the pause
    begins and goes round inside it. The feed is the delivery's from now on, also where making this fails.
    """

    def __init__(
        self,
        plan: TransferPlan,
        feed: Feed,
        blocks: list[torch.Tensor],
        differences: Differences,
        recorder: Recorder,
        alive: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._feed = feed
        self._alive = alive
        self._differences = differences
        self._recorder = recorder
        depth = plan.ring.depth
        staged = depth >= plan.num_buckets
        try:
            buckets = [
                bucket_of(plan, plan.apply, rows, [feed.slots[b % depth]], blocks, undisturbed=staged)
                for b, rows in enumerate(bounds_of(plan))
            ]
        except BaseException:
            feed.close()
            raise
        self._buckets = buckets
        # No stage refers to this object: engines may never collect cycles, and slots are large.
        self._pipeline = RingPipeline(
            [
                PipelineStage(feed.name, feed.fetch),
                PipelineStage("stage", lambda bucket, _slot: buckets[bucket].run_early(STAGE_COPY_S)),
            ],
            plan.num_buckets,
            depth,
            recorder,
            plan.bucket_bytes.tolist(),
        )
        self._released = 0
        self._device = next((block.device for block in blocks if block.is_cuda), None)
        self._is_complete = False

    def stage(self, deadline_s: float) -> None:
        """Fill as many slots as there are."""
        self._pipeline.start()
        ahead = min(self._plan.ring.depth, self._plan.num_buckets)
        if ahead:
            self._pipeline.wait_ready(ahead - 1, deadline_s, self._alive)

    def commit(self, deadline_s: float, writing: Callable[[], None], *, compare: bool) -> None:
        """Take bucket after bucket; may be repeated as long as no slot was given back."""
        limit = time.monotonic() + deadline_s
        self._is_complete = False
        staged = self._plan.ring.depth >= self._plan.num_buckets
        for number, bucket in enumerate(self._buckets):
            if self._released > number:
                message = "a commit from a reused ring cannot be repeated"
                raise ApplyError(message, phase="commit", weights_state="mixed")
            self._pipeline.wait_ready(number, check_deadline(limit, deadline_s), self._alive)
            writing()
            with self._recorder.span("copy", bucket.num_bytes):
                bucket.live.run()
                bucket.live.finish(check_deadline(limit, deadline_s))
            if compare:
                with self._recorder.span("verify"):
                    self._differences.check(bucket)
            if not staged:
                self._give_back(number)
        self._is_complete = True

    def close(self) -> None:
        """Stop fetching and give all slots back; their mapping stays where something may still read it."""
        self._feed.stop()
        is_idle = self._pipeline.close() and self._is_idle()
        self._feed.release(self._plan.num_buckets)
        self._buckets.clear()
        if is_idle:
            self._feed.close()

    def _is_idle(self) -> bool:
        """Wait for copies that a GPU was given and nobody saw the end of: only where no commit came to its end."""
        if self._device is None or self._is_complete:
            return True
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            logger.warning("%s failed: %s; a ring stays mapped", self._device, error)
            return False
        return True

    def _give_back(self, number: int) -> None:
        self._released = number + 1
        self._feed.release(number + 1)
        self._pipeline.release(number)


def check_deadline(limit: float, deadline_s: float) -> float:
    """Return the seconds left until `limit`.

    Raises:
        TransferTimeoutError: None are left.
    """
    left = limit - time.monotonic()
    if left <= 0:
        message = f"the commit did not end within {deadline_s:.1f} s"
        raise TransferTimeoutError(message, phase="commit")
    return left
