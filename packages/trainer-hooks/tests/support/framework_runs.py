"""Runs of Hugging Face's Trainer, and of Accelerate with FSDP, that are compared after every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trainer_world import batch, compare, gathered, load

FLOAT = torch.float32


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Return rows as a dataset has them."""
    rows = [batch(number, 0)[0] for number in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def hugging_face(folder: Path, out: Path, url: str, **options: Any) -> tuple[Any, Any, list[str]]:
    """Train with a Trainer for three steps; returns it, its callback, and what was wrong after any step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from headrace_trainers.transformers import attach

    found: list[str] = []

    class Compare(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            whole = gathered(kwargs["model"])
            if args.process_index == 0:
                dtype = next(iter(whole.values())).dtype
                found.extend(f"step {state.global_step}: {one}" for one in compare(url, whole, dtype, FLOAT))

    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **{"save_strategy": "no", **options},
    )
    if arguments.fsdp:
        allow_fsdp_on_cpu()
    data = {"train_dataset": examples(24), "eval_dataset": examples(2)}
    trainer = Trainer(load(folder), arguments, **data, callbacks=[Compare()])
    callback = attach(trainer, to=f"torch={url}", mode="wait", on_error="raise")
    trainer.train()
    return trainer, callback, found


def allow_fsdp_on_cpu() -> None:
    """Have Accelerate use its FSDP plug-in, which it does only where it believes to have GPUs; it runs over gloo.

    Its name for this processor, `cpu:0`, is one that FSDP1 does not take.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState(cpu=True, backend="gloo")
    state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")
