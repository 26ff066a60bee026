"""Hook: what stands between an optimizer and its next step, on every rank."""

from __future__ import annotations

import atexit
import json
import logging
import time
from types import TracebackType
from typing import Any, Self

from torch import nn

from headrace.errors import HeadraceError, UpdateFailedError
from headrace_trainers.crew import JOIN_S, Crew, CrewHolder
from headrace_trainers.fence import StepFence
from headrace_trainers.publisher import Outcome, Publisher
from headrace_trainers.settings import HookSettings, StepReport
from headrace_trainers.shards import shards_of
from headrace_trainers.source import ShardSource

logger = logging.getLogger(__name__)
_END = "end"


class Hook:
    """Publishes a model's weights to engines after its optimizer's steps. One on every rank, made at the same time.

    Framework modules (`headrace_trainers.fsdp`, ...) make it and call, in the training thread: 1. `before_step` before
    weights change. 2. `after_step` after. 3. `close`, which publishes what is not out yet. No call is a collective.

    Args:
        model: What is trained, wrapped as it is trained.
        settings: Choices, the same on every rank.
        step: Number of the step that the weights are of.

    Raises:
        ConfigError: A parameter cannot be published.
    """

    def __init__(self, model: nn.Module, settings: HookSettings, *, step: int = 0) -> None:
        self.settings = settings
        self.last_report: StepReport | None = None
        self._fence = StepFence(step)
        shards = shards_of(model, settings.rename)
        self._source = ShardSource(shards, self._fence, dtype=settings.dtype)
        self._source.mark_written()
        self._crew = Crew()
        self._publisher = Publisher(self._source, self._crew, settings) if self._crew.rank == 0 else None
        self._holder = CrewHolder(self._source, self._crew) if self._crew.rank else None
        self._waited_s = self._told_s = 0.0
        self._rounds = 0
        self._failures: dict[str, str] = {}
        self._num_ends = 0
        self._end: dict[str, Any] | None = None
        self._closed = False
        atexit.register(self.close, publish=False)

    @property
    def step(self) -> int:
        """The step that the weights are of."""
        return self._fence.step

    @property
    def held_s(self) -> float:
        """Seconds that this rank's training was held up so far."""
        return self._fence.held_s + self._waited_s

    def before_step(self) -> None:
        """Wait until nobody reads the weights that are about to change."""
        if not self._closed and self._fence.begin_write(self.settings.hold_s):
            logger.warning("copying took longer than hold_s=%g; this version is dropped", self.settings.hold_s)

    def after_step(self, *, applied: bool = True) -> None:
        """Say that the step is over; publishes it where it is due.

        Raises:
            UpdateFailedError: With `on_error="raise"`: an update failed, this one (`wait`) or an earlier one.
        """
        if self._closed:
            return
        self._source.mark_written()
        self._fence.end_write(applied=applied)
        is_due = applied and self._fence.step % self.settings.every == 0
        is_shared = is_due and self.settings.mode == "wait"
        if is_due:
            self._publish(wait=is_shared)
        self._deliver(is_shared=is_shared)
        self._raise_if_told()

    def flush(self) -> None:
        """Have the engines serve the weights as they are now, whatever changed them; every rank calls it. Blocking.

        It is called between two steps, where nothing else changes weights.

        Raises:
            UpdateFailedError: With `on_error="raise"`: it failed.
        """
        self._flush(again=True)

    def _flush(self, *, again: bool) -> None:
        self._source.mark_written()
        self._fence.end()
        self._publish(wait=True, again=again)
        self._deliver(is_shared=True)
        self._raise_if_told()

    def close(self, *, publish: bool = True) -> None:
        """Publish what is not out yet and let go of everything; every rank calls it. Idempotent.

        Args:
            publish: Whether to publish first, if the engines do not have the last step.

        Raises:
            UpdateFailedError: With `on_error="raise"`: the last update failed.
        """
        if self._closed:
            return
        try:
            if publish:
                self._flush(again=False)
        finally:
            self._closed = True
            self._fence.end()
            atexit.unregister(self.close)
            if self._publisher is not None:
                self._publisher.close()
                self._crew.dismiss()
                self._deliver(is_shared=True)
            if self._holder is not None:
                self._holder.close(self.settings.deadline_s if publish else JOIN_S)
            self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(publish=kind is None)

    def _publish(self, *, wait: bool, again: bool = False) -> None:
        begin = time.monotonic()
        self._rounds += 1
        try:
            if self._publisher is not None:
                outcome = self._publisher.ask(again=again)
                if wait:
                    self._share(outcome)
            elif wait:
                said = self._crew.wait_outcome(self._rounds, self.settings.deadline_s)
                self._failures = {"": "rank 0 said nothing about the update"} if said is None else said
        except (HeadraceError, RuntimeError) as error:  # the hub, or torch's store
            self._failures = {"": f"{type(error).__name__}: {error}"}
            logger.warning("rank %d could not publish, training goes on: %s", self._crew.rank, error)
        self._waited_s += time.monotonic() - begin

    def _share(self, outcome: Outcome) -> None:
        """Wait for a round's end and tell the other ranks, so that all of them go on or raise together."""
        if outcome.done.wait(self.settings.deadline_s):
            self._failures = outcome.failures
        else:
            self._failures = {"": f"the update did not end within {self.settings.deadline_s:g} s"}
        self._crew.tell_outcome(self._rounds, self._failures)

    def _deliver(self, *, is_shared: bool) -> None:
        """Hand reports over, in the training thread; rank 0 has them. `is_shared` if all ranks know how it went."""
        if self._publisher is None:
            return
        for report in self._publisher.reports(self.held_s - self._told_s):
            self._told_s += report.held_s
            self.last_report = report
            if report.failures and self.settings.on_error == "raise" and not is_shared:
                self._plan_end(report.failures)
            if self.settings.report is not None:
                try:
                    self.settings.report(report)
                except Exception:  # a user's logger must not end training
                    logger.exception("the report callback of the Headrace hook failed")

    def _plan_end(self, failures: dict[str, str]) -> None:
        """Have all ranks raise after the same step: a rank that has ended this one already hears of it in the next."""
        if self._end is None:
            at = self._fence.step + (1 if self._crew.world_size > 1 else 0)
            self._end = {"step": at, "failures": failures}
            self._crew.tell(f"{_END}/{self._num_ends}", json.dumps(self._end))

    def _raise_if_told(self) -> None:
        """Raise on every rank what went wrong, if training is to end by it."""
        failures, self._failures = self._failures, {}
        if self.settings.on_error != "raise":
            return
        if self._crew.rank and self.settings.mode == "background" and self._end is None:
            said = self._crew.heard(f"{_END}/{self._num_ends}")
            self._end = None if said is None else json.loads(said)
        if not failures and self._end is not None and self._fence.step >= self._end["step"]:
            failures, self._end = self._end["failures"], None
            self._num_ends += 1
        if failures:
            text = "; ".join(f"{name}: {why}" if name else why for name, why in failures.items())
            raise UpdateFailedError(text, phase="hook")
