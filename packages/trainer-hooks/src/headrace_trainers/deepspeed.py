"""Hooks for DeepSpeed, ZeRO stages 0 to 3, offloaded to the host or not.

    hook = headrace_trainers.deepspeed.attach(engine, to="vllm=http://rollout:8000")
"""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed import DeepSpeedEngine

from headrace_trainers.hook import Hook
from headrace_trainers.settings import Target
from headrace_trainers.zero import attach_engine


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
    return attach_engine(engine, to=to, **choices)
