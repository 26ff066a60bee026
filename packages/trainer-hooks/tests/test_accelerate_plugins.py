"""FSDP and DeepSpeed where Accelerate applies them by its plug-ins, for itself and for the Trainer of Hugging Face."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="trainers and the embedded engine need transformers")
pytest.importorskip("accelerate", reason="the session `trainers` of nox installs Accelerate")

import torch
from framework_runs import FLOAT, allow_fsdp_on_cpu, hugging_face
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from trainer_world import batch, compare, gathered, join_by_environment, load, optimizer_of

from headrace.testing.engine_process import EngineProcess, free_port
from headrace.testing.ranks import run_ranks

LAYER = "Qwen3DecoderLayer"


def train(accelerator: Any, model: Any, optimizer: Any, url: str) -> None:
    """Take two steps of two batches each, every parameter in the engine compared after each."""
    from headrace_trainers.accelerate import attach

    rank = accelerator.process_index
    to = f"torch={url}"
    with attach(accelerator, model, optimizer, to=to, step=0, mode="wait", on_error="raise") as hook:
        for number in range(1, 5):
            with accelerator.accumulate(model):
                tokens = batch(number, rank)
                accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
                optimizer.step()
                optimizer.zero_grad()
            assert hook.step == number // 2
            whole = gathered(model)
            if rank == 0 and number % 2 == 0:
                assert compare(url, whole, FLOAT, FLOAT) == []


def with_fsdp(rank: int, world_size: int, port: int, url: str, folder: Path, version: int) -> None:
    join_by_environment(rank, world_size, port)
    allow_fsdp_on_cpu()
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[LAYER]
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    model = load(folder)
    if version == 1:  # Accelerate's own rule: the optimizer is made of what is wrapped
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(optimizer_of(model))
    else:
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert isinstance(model, FSDPModule if version == 2 else FullyShardedDataParallel)
    train(accelerator, model, optimizer, url)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("version", [1, 2])
def test_accelerate_with_fsdp(engine: EngineProcess, folder: Path, version: int) -> None:
    run_ranks(with_fsdp, 2, 100, free_port(), engine.url, folder, version)


def with_deepspeed(rank: int, world_size: int, port: int, url: str, folder: Path, stage: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    join_by_environment(rank, world_size, port)
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    PartialState(cpu=True, backend="gloo")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = load(folder)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    train(accelerator, model, optimizer, url)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_with_deepspeed(engine: EngineProcess, folder: Path, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="the session `trainers` of nox installs DeepSpeed")
    run_ranks(with_deepspeed, 2, 100, free_port(), engine.url, folder, stage)


def with_trainer(rank: int, world_size: int, port: int, url: str, folder: Path, out: Path, bf16: bool) -> None:
    join_by_environment(rank, world_size, port)
    config = {"version": 2, "transformer_layer_cls_to_wrap": [LAYER]}
    options = {"fsdp": True, "fsdp_config": config, "ddp_backend": "gloo", "bf16": bf16}
    trainer, _, found = hugging_face(folder, out / str(rank), url, gradient_accumulation_steps=2, **options)
    assert isinstance(trainer.model, FSDPModule)
    assert next(trainer.model.parameters()).dtype == torch.float32
    assert found == []
    logged = [entry["headrace/step"] for entry in trainer.state.log_history if "headrace/version" in entry]
    assert rank or logged == [1, 2, 3]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "computing in bfloat16"])
def test_trainer_with_fsdp(engine: EngineProcess, folder: Path, tmp_path: Path, bf16: bool) -> None:
    run_ranks(with_trainer, 2, 100, free_port(), engine.url, folder, tmp_path, bf16)
