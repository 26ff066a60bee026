"""The callback for Lightning's Trainer, with any of its strategies.

    trainer = lightning.Trainer(..., callbacks=[HeadraceCallback(to="vllm=http://rollout:8000", prefix="model.")])

Reports go to the Trainer's loggers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from headrace_trainers import plain
from headrace_trainers.hook import Hook
from headrace_trainers.settings import HookSettings, StepReport, Target
from headrace_trainers.zero import attach_engine, is_engine


class HeadraceCallback(Callback):  # type: ignore[misc] # skipped by mypy, as not every environment has it
    """Publishes the module after optimizer steps.

    Args:
        to: Engines, such as `vllm=http://host:8000`.
        prefix: Where the model is in the LightningModule (`model.` for `self.model`): taken off names, and what does
            not begin with it is left out.
        choices: Fields of `HookSettings`.

    Attributes:
        hook: The hook while training runs.

    Raises:
        ConfigError: A choice makes no sense.
    """

    def __init__(self, to: Target | Sequence[Target], *, prefix: str = "", **choices: Any) -> None:  # noqa: ANN401
        choices["rename"] = _without(prefix, choices.get("rename"))
        self._to, self._choices = to, choices
        HookSettings.of(to, **choices)
        self.hook: Hook | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's
        """Attach to what the strategy has prepared.

        Raises:
            ConfigError: A parameter cannot be published.
        """

        def log(report: StepReport) -> None:
            for one in trainer.loggers:
                one.log_metrics(report.as_metrics(), step=report.step)

        choices = {"report": log, **self._choices}
        model: Any = trainer.strategy.model
        if is_engine(model):
            self.hook = attach_engine(model, to=self._to, **choices)
        else:
            self.hook = plain.attach(model, trainer.optimizers, to=self._to, step=trainer.global_step, **choices)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Publish what is not out yet, and let go of the module."""
        self._close(publish=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Let go of the module; the engines keep what they serve."""
        self._close(publish=False)

    def _close(self, *, publish: bool) -> None:
        hook, self.hook = self.hook, None
        if hook is not None:
            hook.close(publish=publish)


def _without(prefix: str, rename: Callable[[str], str | None] | None) -> Callable[[str], str | None]:
    def named(name: str) -> str | None:
        if not name.startswith(prefix):
            return None
        bare = name.removeprefix(prefix)
        return bare if rename is None else rename(bare)

    return named
