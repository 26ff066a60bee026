"""Publisher: rank 0's side of a hook - updates engines from all ranks, in a thread of its own, one at a time."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from headrace.config import EngineTarget
from headrace.errors import HeadraceError, LocalProtocolError
from headrace.registry import engine_control
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer
from headrace_trainers.crew import Crew
from headrace_trainers.settings import HookSettings, StepReport, Target
from headrace_trainers.source import ShardSource

logger = logging.getLogger(__name__)
JOIN_S = 30.0


@dataclass
class Outcome:
    """What became of one round; valid when `done` is set.

    Attributes:
        again: Whether to publish also where the engines have this step.
        done: Set at its end.
        update: The core's report, or None where no engine was updated.
        failures: What went wrong, by engine; under an empty name where it concerns them all.
    """

    again: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    update: UpdateReport | None = None
    failures: dict[str, str] = field(default_factory=dict)


class Publisher:
    """Brings the newest step into the engines whenever it is asked, never more than one round ahead.

    Args:
        source: Rank 0's shards.
        crew: All ranks.
        settings: The hook's choices.
    """

    def __init__(self, source: ShardSource, crew: Crew, settings: HookSettings) -> None:
        self._settings = settings
        self._source = source
        self._server = ParameterServer(source=source, launch=crew)
        self._wanted = threading.Condition()
        self._next: Outcome | None = None
        self._closed = False
        self._finished: deque[Outcome] = deque()
        self._told: set[str] = set()
        self._out_step: int | None = None
        self._thread = threading.Thread(target=self._run, name="headrace-hook", daemon=True)
        self._thread.start()

    def ask(self, *, again: bool = False) -> Outcome:
        """Have the newest weights published as soon as the update under way has ended; returns before that.

        Asking once more before it has begun is the same request: a step that is past is skipped. `again` publishes a
        step also where the engines have it: its weights may have been changed since.
        """
        with self._wanted:
            if self._closed:
                raise LocalProtocolError("this hook is closed; attach a new one")
            if self._next is None:
                self._next = Outcome()
                self._wanted.notify()
            self._next.again |= again
            return self._next

    def reports(self, held_s: float) -> list[StepReport]:
        """Return what has become of rounds that ended since the last call; `held_s` goes to the first of them."""
        found = []
        while self._finished:
            one = self._finished.popleft()
            held, held_s = held_s, 0.0
            step = one.update.step if one.update else None
            found.append(StepReport(step=step, update=one.update, held_s=held, failures=one.failures))
        return found

    def close(self) -> None:
        """End after the round under way; blocking, idempotent."""
        with self._wanted:
            self._closed = True
            self._wanted.notify()
        self._thread.join(JOIN_S)
        self._server.close()

    def _run(self) -> None:
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._next is not None or self._closed)
                outcome, self._next = self._next, None
            if outcome is None:
                return
            if outcome.again or self._told or self._out_step != self._source.step:
                self._round(outcome)
                self._finished.append(outcome)
            outcome.done.set()

    def _round(self, outcome: Outcome) -> None:
        """Update every engine that answers; whatever goes wrong becomes part of the outcome."""
        failures: dict[str, str] = {}
        try:
            ready = self._ready(failures)
            if ready:
                outcome.update = self._server.update(ready, self._settings.update)
                self._out_step = outcome.update.step
        except Exception as error:  # noqa: BLE001 - training must not end by a hook: this is its boundary
            text = f"{type(error).__name__}: {error}"
            engines = getattr(error, "engines", {}) or {"": "old"}
            failures |= {name: text for name, state in engines.items() if state != "new"}
        outcome.failures.update(failures)
        self._log(failures)

    def _ready(self, failures: dict[str, str]) -> list[Target]:
        """Return the engines that answer within `ready_s`; the others must not keep them from the update."""
        targets = list(self._settings.to)
        if len(targets) == 1:
            return targets
        with ThreadPoolExecutor(len(targets), "headrace-probe") as pool:
            errors = list(zip(targets, pool.map(self._probe, targets), strict=True))
        failures |= {_address(target): error for target, error in errors if error is not None}
        return [target for target, error in errors if error is None]

    def _probe(self, target: Target) -> str | None:
        control = engine_control(target) if isinstance(target, str | EngineTarget) else target
        try:
            control.wait_ready(self._settings.update.deadlines.ready_s)
        except HeadraceError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            if control is not target:
                control.close()
        return None

    def _log(self, failures: dict[str, str]) -> None:
        """Log each failure when it is new, and once when an engine is well again."""
        for name, text in failures.items():
            if name not in self._told:
                logger.warning("the update%s failed; the next one catches up: %s", f" of {name}" if name else "", text)
        for name in self._told - failures.keys():
            logger.info("the engine %s takes updates again", name or "list")
        self._told = set(failures)


def _address(target: Target) -> str:
    return target if isinstance(target, str) else target.address
