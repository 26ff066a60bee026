"""Hooks for loops written with Accelerate, whatever it distributes with.

    hook = headrace_trainers.accelerate.attach(accelerator, model, optimizer, to="vllm=http://rollout:8000")

`model` and `optimizer` are what `accelerator.prepare` returned; reports go to `accelerator.log`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from headrace_trainers import plain
from headrace_trainers.hook import Hook
from headrace_trainers.settings import StepReport, Target
from headrace_trainers.zero import attach_engine


def attach(
    accelerator: Accelerator,
    model: Any,  # noqa: ANN401 - a module or a DeepSpeed engine
    optimizer: Any,  # noqa: ANN401 - Accelerate's wrapper
    *,
    to: Target | Sequence[Target],
    **choices: Any,  # noqa: ANN401
) -> Hook:
    """Publish a prepared model after its optimizer's steps; every rank calls it at the same step.

    Args:
        accelerator: Has prepared the model.
        model: What `prepare` returned.
        optimizer: What `prepare` returned.
        to: Engines, such as `vllm=http://host:8000`.
        choices: Fields of `HookSettings`, and `step`, which DeepSpeed counts itself.

    Raises:
        ConfigError: A choice makes no sense, or a parameter cannot be published.
    """

    def log(report: StepReport) -> None:
        accelerator.log(report.as_metrics(), step=report.step)

    choices.setdefault("report", log)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        choices.pop("step", None)
        return attach_engine(model, to=to, **choices)
    return plain.attach(model, optimizer, to=to, **choices)
