"""The callback for Hugging Face's `Trainer`, on whatever it trains with: one process, DDP, FSDP, DeepSpeed.

    trainer = Trainer(..., callbacks=[HeadraceCallback(to="vllm=http://rollout:8000")])

Reports appear in `trainer.state.log_history` and in the logs of callbacks after this one; `attach(trainer, ...)` puts
it before all others, so that every integration (TensorBoard, W&B, ...) has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any, cast

from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from headrace_trainers.hook import Hook
from headrace_trainers.optimizers import watch
from headrace_trainers.settings import HELD, HookSettings, StepReport, Target


class HeadraceCallback(TrainerCallback):  # type: ignore[misc] # has no types
    """Publishes the model after optimizer steps of a `Trainer`.

    Args:
        to: Engines, such as `vllm=http://host:8000`.
        choices: Fields of `HookSettings`.

    Attributes:
        hook: The hook while training runs.

    Raises:
        ConfigError: A choice makes no sense.
    """

    def __init__(self, to: Target | Sequence[Target], **choices: object) -> None:
        self._report = choices.pop("report", None)
        self.settings = HookSettings.of(to, report=self._take, **choices)
        self.hook: Hook | None = None
        self._is_deepspeed = False
        self._metrics: dict[str, float] = {}

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: object
    ) -> None:
        """Attach to what the Trainer has prepared.

        Raises:
            ConfigError: A parameter cannot be published.
        """
        if self.hook is not None:  # the last run broke off, of which no callback is told
            self.hook.close(publish=False)
        optimizer: Any = kwargs["optimizer"]
        self.hook = Hook(cast("nn.Module", kwargs["model"]), self.settings, step=state.global_step)
        self._is_deepspeed = isinstance(optimizer, DeepSpeedOptimizerWrapper)
        if self._is_deepspeed:
            _fence(optimizer.optimizer, self.hook)
        else:
            watch(optimizer, self.hook)

    def on_optimizer_step(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **kwargs: object
    ) -> None:
        """Publish a step of DeepSpeed, whose weights are only now whole; torch's optimizers say so themselves."""
        if self.hook is not None and self._is_deepspeed:
            optimizer: Any = kwargs["optimizer"]
            self.hook.after_step(applied=not optimizer.step_was_skipped)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_kwargs: object,
    ) -> None:
        """Add the newest report to what is logged, and the seconds that training was held up since the last one."""
        if self._metrics and logs is not None:
            logs.update(self._metrics)
            if state.log_history:
                state.log_history[-1].update(self._metrics)
            self._metrics = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: object
    ) -> None:
        """Publish what is not out yet, or the best model where the Trainer has just loaded it; let go of the model."""
        hook, self.hook = self.hook, None
        if hook is None:
            return
        with hook:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                hook.flush()

    def _take(self, report: StepReport) -> None:
        held_s = self._metrics.get(HELD, 0.0) + report.held_s
        self._metrics = report.as_metrics() | {HELD: held_s}
        if callable(self._report):
            self._report(report)


def attach(trainer: Trainer, *, to: Target | Sequence[Target], **choices: object) -> HeadraceCallback:
    """Add a `HeadraceCallback` to a Trainer, before all other callbacks; every rank calls it before `train`.

    Raises:
        ConfigError: A choice makes no sense.
    """
    callback = HeadraceCallback(to, **choices)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def _fence(optimizer: Any, hook: Hook) -> None:  # noqa: ANN401 - DeepSpeed has no types
    """Have DeepSpeed's optimizer wait for readers; Accelerate steps it inside `backward`, before any callback."""
    inner = optimizer.step

    @wraps(inner)
    def step(*args: object, **options: object) -> object:
        hook.before_step()
        return inner(*args, **options)

    optimizer.step = step
