"""One rank of the trainers that `benchmarks.trainers` measures: Qwen3-0.6B under FSDP2 or DeepSpeed ZeRO-3."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.config import Deadlines, UpdateSettings
from headrace_trainers import StepReport, deepspeed, fsdp
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
class Run:
    """What is to be measured.

    Attributes:
        framework: `fsdp2` or `zero3`.
        model: Folder with the model's configuration.
        url: The engine.
        port: Where the ranks meet.
        steps: Steps per series.
        rounds: How often the series take turns.
        device: `cpu` or `cuda`.
        verify: Verification of the updates.
        saved: Where the usual way puts its file.
    """

    framework: str
    model: str
    url: str
    port: int
    steps: int
    rounds: int
    device: str
    verify: str
    saved: str


@dataclass
class Seconds:
    """Rank 0's measurements.

    Attributes:
        without: Steps without a hook.
        beside: Steps while updates go on in the background.
        held: Of these, how long each was held up by fences.
        reports: What the updates took.
        waited: Steps that wait for the engine, hook included.
        gather: Gathering all weights, the usual way.
        save: Writing them to a file.
        copy: One plain copy of this rank's shard in the published dtype.
        shard_bytes: Its size.
        extra_bytes: What the hook's segments took.
        params: Parameters of the model.
    """

    without: list[float]
    beside: list[float]
    held: list[float]
    reports: list[StepReport]
    waited: list[float]
    gather: list[float]
    save: list[float]
    copy: list[float]
    shard_bytes: int = 0
    extra_bytes: int = 0
    params: int = 0


@dataclass
class _Trainer:
    step: Callable[[], None]
    attach: Callable[..., Hook]
    gather: Callable[[], Mapping[str, torch.Tensor]]
    num_params: int


def measure(rank: int, world_size: int, run: Run) -> Seconds:
    """Train, with and without a hook in turns, and the usual way."""
    _join(rank, world_size, run)
    trainer = {"fsdp2": _fsdp2, "zero3": _zero3}[run.framework](run)
    found = Seconds([], [], [], [], [], [], [], [])
    found.params = trainer.num_params
    trainer.step()
    settings = UpdateSettings(verify=run.verify, deadlines=Deadlines(ready_s=30))  # type: ignore[arg-type]
    for _ in range(run.rounds):
        found.without += [_timed(trainer.step) for _ in range(run.steps)]
        _beside(trainer, run, settings, found)
    for _ in range(2):
        _usual_way(trainer, run, found)
    return found


def _usual_way(trainer: _Trainer, run: Run, found: Seconds) -> None:
    """Gather everything; rank 0 writes the file that an engine then loads."""
    begin = time.monotonic()
    whole = trainer.gather()
    found.gather.append(time.monotonic() - begin)
    if dist.get_rank() == 0:
        found.save.append(_timed(lambda: save_file(dict(whole), run.saved)))
    dist.barrier()


def _beside(trainer: _Trainer, run: Run, settings: UpdateSettings, found: Seconds) -> None:
    choices = {"to": f"torch={run.url}", "dtype": "bfloat16", "update": settings, "report": found.reports.append}
    with trainer.attach(mode="background", **choices) as hook:
        trainer.step()  # makes the segments, records the recipe
        hook.flush()
        found.reports.clear()
        for _ in range(run.steps):
            before = hook.held_s
            found.beside.append(_timed(trainer.step))
            found.held.append(hook.held_s - before)
        hook.flush()
        found.extra_bytes = _resident_bytes()
        source = hook._source
        own = (region for i, region in enumerate(source.regions()) if i not in source.aliases())
        found.shard_bytes = 2 * sum(region.box.num_elements for region in own)
        found.copy.append(_copy_seconds(found.shard_bytes))


def _resident_bytes() -> int:
    """Return how much memory the segments of this process really take."""
    links = [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    own = [os.fstat(int(link.name)) for link in links if "memfd:headrace" in str(link.readlink())]
    return 512 * sum({stat.st_ino: stat.st_blocks for stat in own}.values())


def _copy_seconds(num_bytes: int) -> float:
    source, target = torch.ones(num_bytes // 2, dtype=torch.float32), torch.empty(num_bytes // 2, dtype=torch.bfloat16)
    target.copy_(source)
    return min(_timed(lambda: target.copy_(source)) for _ in range(3))


def _timed(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.monotonic()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - begin


def _join(rank: int, world_size: int, run: Run) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(run.port), "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's and DeepSpeed's own, one per collective
    if run.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("nccl" if run.device == "cuda" else "gloo", rank=rank, world_size=world_size)


def _model(run: Run, dtype: torch.dtype) -> Any:  # noqa: ANN401 - transformers has no types
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(Path(run.model))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


def _fill(model: Any) -> None:  # noqa: ANN401
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    rotary = model.model.rotary_emb
    rotary.inv_freq.copy_(1e6 ** -(torch.arange(0, rotary.inv_freq.numel()) / rotary.inv_freq.numel()))


def _batch(run: Run) -> torch.Tensor:
    return torch.randint(3, 1000, TOKENS, device=run.device)


def _fsdp2(run: Run) -> _Trainer:
    model = _model(run, torch.float32)
    mesh = init_device_mesh(run.device, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=run.device)
    _fill(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        tokens = _batch(run)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    def gather() -> Mapping[str, torch.Tensor]:
        pairs = ((name, p.full_tensor().to("cpu", torch.bfloat16)) for name, p in model.named_parameters())
        return {name: tensor for name, tensor in pairs if dist.get_rank() == 0}

    def attach(**choices: Any) -> Hook:  # noqa: ANN401
        return fsdp.attach(model, optimizer, **choices)

    return _Trainer(step, attach, gather, sum(p.numel() for p in model.parameters()))


def _zero3(run: Run) -> _Trainer:
    import deepspeed as ds  # noqa: PLC0415 - it takes long, and not every run needs it

    ds.init_distributed("nccl" if run.device == "cuda" else "gloo", dist_init_required=False, verbose=False)
    model = _model(run, torch.bfloat16).to_empty(device="cpu")
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
        tokens = _batch(run)
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

    return _Trainer(step, attach, gather, sum(p.ds_numel for p in engine.module.parameters()))
