"""Hooks on DeepSpeed engines; imports no DeepSpeed, so that Accelerate and Lightning can do without it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

from headrace.errors import ConfigError
from headrace_trainers.hook import Hook
from headrace_trainers.settings import HookSettings, Target


def is_engine(model: Any) -> bool:  # noqa: ANN401 - anything that a framework prepared
    """Return whether a model is a DeepSpeedEngine."""
    return hasattr(model, "was_step_applied")


def attach_engine(engine: Any, *, to: Target | Sequence[Target], **choices: object) -> Hook:  # noqa: ANN401
    """Publish an engine's weights after each step that it applied.

    DeepSpeed has no callback after a step, and its optimizer's own hooks come before the weights are written; so the
    engine's `step` is wrapped.

    Raises:
        ConfigError: A choice makes no sense, a parameter cannot be published, or this is no DeepSpeed engine, or one
            with pipeline stages.
    """
    if not is_engine(engine):
        message = f"{type(engine).__name__} is no DeepSpeedEngine; give what deepspeed.initialize returned"
        raise ConfigError(message, name="engine")
    if engine.pipeline_parallelism:
        message = "this engine has pipeline stages, whose steps DeepSpeed tells nobody of; train with ZeRO 0 to 3"
        raise ConfigError(message, name="engine")
    hook = Hook(engine.module, HookSettings.of(to, **choices), step=int(engine.global_steps))
    _wrap(engine, hook)
    return hook


def _wrap(engine: Any, hook: Hook) -> None:  # noqa: ANN401 - DeepSpeed has no types
    inner = engine.step

    @wraps(inner)
    def step(*args: object, **options: object) -> object:
        if _ends_accumulation(engine):
            hook.before_step()
            result = inner(*args, **options)
            hook.after_step(applied=engine.was_step_applied())
            return result
        return inner(*args, **options)

    engine.step = step


def _ends_accumulation(engine: Any) -> bool:  # noqa: ANN401
    """Return whether the engine's next `step` is one of its optimizer."""
    is_managed = getattr(engine, "managed_gradient_accumulation", None)  # DeepSpeed 0.19.4 and later
    if is_managed is not None and not is_managed():
        return True  # the boundary is there only inside of `step`
    return bool(engine.is_gradient_accumulation_boundary())
