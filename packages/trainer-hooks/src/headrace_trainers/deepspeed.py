"""Hooks for DeepSpeed, ZeRO stages 0 to 3, offloaded to the host or not.

    hook = headrace_trainers.deepspeed.attach(engine, to="vllm=http://rollout:8000")

DeepSpeed has no callback after a step, and its optimizer's own hooks come before the weights are written; so the
engine's `step` is wrapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from headrace.errors import ConfigError
from headrace_trainers.hook import Hook
from headrace_trainers.settings import HookSettings, Target

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def attach(engine: DeepSpeedEngine, *, to: Target | Sequence[Target], **choices: object) -> Hook:
    """Publish an engine's weights after each `engine.step()` that applied one; every rank calls it at the same step.

    Micro-steps of gradient accumulation and steps that were skipped for an overflow publish nothing. Steps are counted
    on from `engine.global_steps`.

    Args:
        engine: What `deepspeed.initialize` returned.
        to: Engines, such as `vllm=http://host:8000`.
        choices: Fields of `HookSettings`.

    Raises:
        ConfigError: A choice makes no sense, a parameter cannot be published, or this is no DeepSpeed engine.
    """
    if not hasattr(engine, "was_step_applied"):
        message = f"{type(engine).__name__} is no DeepSpeedEngine; give what deepspeed.initialize returned"
        raise ConfigError(message, name="engine")
    hook = Hook(engine.module, HookSettings.of(to, **choices), step=int(engine.global_steps))
    _wrap(engine, hook)
    return hook


def _wrap(engine: Any, hook: Hook) -> None:  # noqa: ANN401 - DeepSpeed has no types
    inner = engine.step

    @wraps(inner)
    def step(*args: object, **options: object) -> object:
        # Unmanaged accumulation has its boundary only inside of `step`.
        if not engine.managed_gradient_accumulation() or engine.is_gradient_accumulation_boundary():
            hook.before_step()
            result = inner(*args, **options)
            hook.after_step(applied=engine.was_step_applied())
            return result
        return inner(*args, **options)

    engine.step = step
