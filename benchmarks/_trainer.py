"""The trainers that `benchmarks.trainers` measures: a Qwen3 under FSDP2 or DeepSpeed ZeRO-3, one rank of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from headrace_trainers import deepspeed, fsdp
from headrace_trainers.hook import Hook

TOKENS = (1, 32)
LEARNING_RATE = 1e-6
SMALL_BUFFERS = {
    "reduce_bucket_size": 20_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_max_live_parameters": 20_000_000,
    "stage3_max_reuse_distance": 20_000_000,
    "sub_group_size": 50_000_000,
}
"""DeepSpeed's own are meant for GPUs and take gigabytes of this machine's memory."""


@dataclass(frozen=True)
class Trainer:
    """One rank's trainer.

    Attributes:
        step: Takes one optimizer step.
        attach: The hook's `attach`, with the trainer's own objects.
        gather: Gathers all weights in bfloat16, the usual way; a collective.
        num_params: Parameters of the model.
        dtype: What the rank's shard is kept in, from which it is published.
    """

    step: Callable[[], None]
    attach: Callable[..., Hook]
    gather: Callable[[], Mapping[str, torch.Tensor]]
    num_params: int
    dtype: torch.dtype


def make_trainer(framework: str, folder: Path, device: str) -> Trainer:
    """Return a trainer of a model that `folder` describes, with random weights."""
    return {"fsdp2": _fsdp2, "zero3": _zero3}[framework](folder, device)


def join(rank: int, world_size: int, port: int, device: str) -> None:
    """Meet the other ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's and DeepSpeed's own, one per collective
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=world_size)


def _model(folder: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401 - transformers has no types
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


def _fill(model: Any) -> None:  # noqa: ANN401
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    rotary = model.model.rotary_emb
    rotary.inv_freq.copy_(1e6 ** -(torch.arange(0, rotary.inv_freq.numel()) / rotary.inv_freq.numel()))


def _batch(device: str) -> torch.Tensor:
    return torch.randint(3, 1000, TOKENS, device=device)


def _fsdp2(folder: Path, device: str) -> Trainer:
    model = _model(folder, torch.float32)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    _fill(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        tokens = _batch(device)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    def gather() -> Mapping[str, torch.Tensor]:
        pairs = ((name, p.full_tensor().to("cpu", torch.bfloat16)) for name, p in model.named_parameters())
        return {name: tensor for name, tensor in pairs if dist.get_rank() == 0}

    def attach(**choices: Any) -> Hook:  # noqa: ANN401
        return fsdp.attach(model, optimizer, **choices)

    return Trainer(step, attach, gather, sum(p.numel() for p in model.parameters()), torch.float32)


def _zero3(folder: Path, device: str) -> Trainer:
    import deepspeed as ds  # noqa: PLC0415 - it takes long, and not every run needs it

    ds.init_distributed("nccl" if device == "cuda" else "gloo", dist_init_required=False, verbose=False)
    model = _model(folder, torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    _fill(model)
    config = {
        "train_micro_batch_size_per_gpu": TOKENS[0],
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": SMALL_BUFFERS | {"stage": 3},
        "bf16": {"enabled": True},
    }
    engine, *_ = ds.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step() -> None:
        tokens = _batch(device)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    def gather() -> Mapping[str, torch.Tensor]:
        found = {}
        for name, parameter in engine.module.named_parameters():
            with ds.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    found[name] = parameter.detach().to("cpu", copy=True)
        return found

    def attach(**choices: Any) -> Hook:  # noqa: ANN401
        return deepspeed.attach(engine, **choices)

    return Trainer(step, attach, gather, sum(p.ds_numel for p in engine.module.parameters()), torch.bfloat16)
