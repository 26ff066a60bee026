"""Hooks for plain modules and DDP.

    hook = headrace_trainers.plain.attach(model, optimizer, to="vllm=http://rollout:8000")
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from headrace_trainers.hook import Hook
from headrace_trainers.optimizers import watch
from headrace_trainers.settings import HookSettings, Target


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    to: Target | Sequence[Target],
    step: int = 0,
    **choices: object,
) -> Hook:
    """Publish `model` to engines after the optimizer's steps; every rank calls it, at the same step.

    Args:
        model: Plain, DDP, or any mixture of wrappers that `headrace_trainers.shards` knows.
        optimizer: The torch optimizer, or several; a step ends with that of the last one.
        to: Engines, such as `vllm=http://host:8000`.
        step: Number of the step that the weights are of.
        choices: Fields of `HookSettings`.

    Raises:
        ConfigError: A choice makes no sense, or a parameter cannot be published.
    """
    hook = Hook(model, HookSettings.of(to, **choices), step=step)
    watch(optimizer, hook)
    return hook
