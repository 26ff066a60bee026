"""Little trainers of every kind: a real model and optimizer on some gloo ranks, beside an engine that serves it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _world
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
from torch.distributed.tensor import DTensor

from headrace.embedded.control import TorchControl
from headrace.testing.engine_process import differences, fingerprints
from headrace.testing.tiny_model import TinySize
from headrace_trainers.hook import Hook
from headrace_trainers.shards import clean_name

ODD = TinySize(hidden=50, intermediate=78, num_heads=4, num_kv_heads=2, head_dim=10)
"""Divides by two tensor-parallel workers of an engine, and by hardly any number of trainers."""
LEARNING_RATE = 1e-2


@dataclass
class Trainer:
    """One rank's trainer.

    Attributes:
        model: As it is trained.
        step: Takes one optimizer step on a batch.
        optimizer: What changes the weights.
    """

    model: Any
    step: Callable[[torch.Tensor], None]
    optimizer: Any

    def whole(self) -> dict[str, torch.Tensor]:
        """Return all weights as they are now, gathered; on every rank."""
        return gathered(self.model)


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of all weights of a model, whole; a collective where they are sharded. For comparison only."""
    with _unsharded(model):
        pairs = [(clean_name(name), parameter.detach()) for name, parameter in model.named_parameters()]
        return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in pairs}


def _unsharded(model: Any) -> AbstractContextManager[Any]:
    parameters = list(model.parameters())
    if hasattr(parameters[0], "ds_tensor"):
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)
    if any(isinstance(module, Fsdp) for module in model.modules()):
        return Fsdp.summon_full_params(model, writeback=False)
    return nullcontext()


def join(rank: int, world_size: int, port: int) -> None:
    """Meet the other ranks over gloo."""
    join_by_environment(rank, world_size, port)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)


def join_by_environment(rank: int, world_size: int, port: int) -> None:
    """Set what launchers set, for frameworks that make the process group themselves."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model of a checkpoint, the same on every rank."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()


def batch(step: int, rank: int, vocab: int = 300) -> torch.Tensor:
    """Return random tokens of a step; every rank has its own."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(3, vocab, (2, 12), generator=generator)


def plain_step(model: Any, optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
    """Return a step with a loss of its own: every layout has this one."""

    def step(tokens: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer whose steps change every weight."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)


def compare(url: str, whole: Mapping[str, torch.Tensor], published: torch.dtype, live: torch.dtype) -> list[str]:
    """Return which of an engine's live tensors are not the trainer's weights after the casts."""
    return differences(fingerprints(url), {name: t.detach().to(published).to(live) for name, t in whole.items()})


def collectives() -> dict[str, int]:
    """Return how many collectives every process group has had."""
    return {name: group._get_sequence_number_for_group() for group, name in _world.pg_names.items()}


def count_collectives(hook: Hook, found: list[str]) -> None:
    """Note in `found` if a hook has a collective of its own after a step; in `wait`, that is the whole update."""
    inner = hook.after_step

    def after_step(**options: bool) -> None:
        before = collectives()
        inner(**options)
        if collectives() != before:
            found.append(f"collectives of an update: {before} became {collectives()}")

    hook.after_step = after_step  # type: ignore[method-assign]


class Witness(TorchControl):
    """Control of an embedded engine that notes what it holds whenever it is about to go on with a new version.

    Attributes:
        seen: Version, and the fingerprints of all its live tensors.
        go_on: Set before an update can end.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.seen: list[tuple[int | None, list[dict[str, Any]]]] = []
        self.go_on = threading.Event()

    def resume(self, deadline_s: float) -> None:
        """Look, then resume, when told to."""
        assert self.go_on.wait(30)
        self.seen.append((self.served_version(deadline_s), fingerprints(self._url)))
        super().resume(deadline_s)
