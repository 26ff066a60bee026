"""Hooks onto torch optimizers: the fence before a step, the publication after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from headrace.errors import ConfigError
from headrace_trainers.hook import Hook


def raw_optimizer(optimizer: Any) -> Optimizer:  # noqa: ANN401 - wrappers of any framework
    """Return the torch optimizer inside wrappers that keep it as `optimizer` (Accelerate, Lightning).

    Raises:
        ConfigError: There is none.
    """
    seen = optimizer
    while not isinstance(seen, Optimizer) or hasattr(seen, "optimizer"):
        inner = getattr(seen, "optimizer", None)
        if inner is None:
            message = f"{type(optimizer).__name__} holds no torch optimizer; give the one that changes the weights"
            raise ConfigError(message, name="optimizer")
        seen = inner
    return seen


def watch(optimizers: Optimizer | Sequence[Optimizer], hook: Hook) -> None:
    """Have `hook` called around the steps of one or several optimizers; a step ends with that of the last one."""
    chosen = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    raw = [raw_optimizer(one) for one in chosen]
    for one in raw:
        one.register_step_pre_hook(lambda *_: hook.before_step())
    raw[-1].register_step_post_hook(lambda *_: hook.after_step())
