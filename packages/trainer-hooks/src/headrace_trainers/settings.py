"""What a user chooses when attaching a hook, and what comes back after every update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from headrace.config import Deadlines, EngineTarget, UpdateSettings
from headrace.errors import ConfigError
from headrace.registry import engine_control
from headrace.report import UpdateReport
from headrace.server.parameter_server import Target

__all__ = ["HELD", "HOOK_UPDATE", "HookSettings", "ReportCallback", "StepReport", "Target"]

Mode = Literal["wait", "background"]
OnError = Literal["raise", "warn"]

HOOK_UPDATE = UpdateSettings(deadlines=Deadlines(ready_s=5.0, read_s=600.0))
"""A step does not wait long for an engine that is down."""
HELD = "headrace/held_s"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What became of one step that was to be published; made on the rank that leads.

    Attributes:
        step: The step whose weights the engines serve now; None where it failed before that was settled.
        update: The core's report, or None where no engine was updated.
        held_s: Seconds that training was held up on this rank since the last report: fences, and waiting in `wait`.
        failures: What went wrong, by engine; under an empty name where it concerns them all.
    """

    step: int | None
    update: UpdateReport | None
    held_s: float
    failures: dict[str, str] = field(default_factory=dict)

    def as_metrics(self) -> dict[str, float]:
        """Return the numbers that a trainer's logger can show."""
        metrics = {HELD: self.held_s, "headrace/failed_engines": float(len(self.failures))}
        if self.step is not None:
            metrics["headrace/step"] = float(self.step)
        if self.update is not None:
            metrics |= {
                "headrace/version": float(self.update.version),
                "headrace/stall_s": self.update.stall_s,
                "headrace/total_s": self.update.total_s,
                "headrace/read_s": self.update.read_s,
            }
        return metrics


ReportCallback = Callable[[StepReport], None]


@dataclass(frozen=True, kw_only=True)
class HookSettings:
    """Choices of one hook; the same on every rank.

    Attributes:
        to: Engines, as `ParameterServer.update` takes them.
        every: Steps from one publication to the next. In `background` it is of the newest step when it begins.
        mode: `background`: training goes on, and a step that is past when the last update ends is skipped.
            `wait`: a step returns when the engines serve it.
        on_error: `warn` logs, trains on and catches up at the next publication; `raise` ends training.
        dtype: Floating dtype to publish in, such as `bfloat16`; None keeps each parameter's own.
        rename: From a parameter's cleaned name to its checkpoint name; None leaves it out.
        report: Called in the training thread of rank 0 after every publication.
        update: Settings of each update; vary the default, `HOOK_UPDATE`, as it waits only briefly for an engine.
        hold_s: Longest that an optimizer step waits for the weights of the last one to be copied.
        deadline_s: Longest that a step waits in `wait`, or `flush` for its update.
    """

    to: Sequence[Target]
    every: int = 1
    mode: Mode = "background"
    on_error: OnError = "warn"
    dtype: str | None = None
    rename: Callable[[str], str | None] | None = None
    report: ReportCallback | None = None
    update: UpdateSettings = HOOK_UPDATE
    hold_s: float = 60.0
    deadline_s: float = 600.0

    def __post_init__(self) -> None:
        for name, allowed in (("mode", Mode), ("on_error", OnError)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(allowed))}", name=name)
        if self.every < 1:
            raise ConfigError(f"every is {self.every}; the least is 1", name="every")
        if not self.to:
            raise ConfigError("a hook needs at least one engine", name="to")
        for target in self.to:
            if isinstance(target, str | EngineTarget):
                engine_control(target).close()  # dials nobody; a wrong address is told of now

    @classmethod
    def of(cls, to: Target | Sequence[Target], **choices: object) -> HookSettings:
        """Return settings from `attach`'s keywords; `to` may be one engine.

        Raises:
            ConfigError: A choice makes no sense; names it.
            BackendUnavailableError: No such engine is installed.
        """
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(choices.keys() - known):
            raise ConfigError(f"no such choice: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        return cls(to=[to] if isinstance(to, Target) else list(to), **choices)  # type: ignore[arg-type]
