"""Hooks onto torch optimizers: the fence before a step, the publication after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from headrace.errors import ConfigError
from headrace_trainers.hook import Hook

_Arguments = tuple[Any, ...]
_Options = dict[str, Any]


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
        one.register_step_pre_hook(_fencing(hook))
    raw[-1].register_step_post_hook(lambda *_: hook.after_step())


def _fencing(hook: Hook) -> Callable[[Optimizer, _Arguments, _Options], tuple[_Arguments, _Options] | None]:
    """Return what fences a step: at its begin, or behind a closure, from which torch's own optimizers get gradients."""

    def fence(optimizer: Optimizer, arguments: _Arguments, options: _Options) -> tuple[_Arguments, _Options] | None:
        closure = options.get("closure", arguments[1] if len(arguments) > 1 else None)
        if closure is None or not type(optimizer).__module__.startswith("torch.optim."):
            hook.before_step()
            return None

        def fenced() -> Any:  # noqa: ANN401 - a loss
            loss = closure()
            hook.before_step()
            return loss

        return (optimizer,), {**options, "closure": fenced}

    return fence
