"""Trainers of DeepSpeed: ZeRO 0 to 3, offloaded or not, in float32 and in bfloat16."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from trainer_world import LEARNING_RATE, Trainer, load


def _config(stage: int, *, bf16: bool, accumulate: int, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 60}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }


def make(folder: Path, stage: int, *, bf16: bool = True, accumulate: int = 1, offload: bool = False) -> Trainer:
    """Return a DeepSpeed trainer; its `model` is the engine."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"}
    import deepspeed

    deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
    model = load(folder, torch.bfloat16 if bf16 else torch.float32)
    config = _config(stage, bf16=bf16, accumulate=accumulate, offload=offload)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(tokens: torch.Tensor) -> None:
        for _ in range(accumulate):
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()

    return Trainer(engine, step, optimizer)


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "accumulate": 2},
    "zero3": {"stage": 3},
    "zero3-float32": {"stage": 3, "bf16": False, "accumulate": 2},
    "zero2-offload": {"stage": 2, "offload": True},
    "zero3-offload": {"stage": 3, "offload": True},
}
