"""A trainer that needs torch alone, of a model by its parameters' names and shapes, into an engine in this process."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from headrace.config import UpdateSettings
from headrace.testing import shapes
from headrace.testing.local_engine import LocalEngine
from headrace.testing.recipe_backend import RecipeBackend
from headrace.types import ParamMeta, WorkerId
from headrace_trainers import fsdp

SHAPE = shapes.ModelShape(layers=2, hidden=67, vocab=131, heads=4, kv_heads=2, head_dim=18, intermediate=90)
"""Divides by two workers of an engine, and by two ranks hardly anywhere."""
WORKERS = 2
STEPS = 5


class Node(nn.Module):
    """Part of a model; its forward uses every parameter, so that a step changes each of their elements."""

    def forward(self, total: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            total = child(total)
        for parameter in self.parameters(recurse=False):
            total = total + parameter.float().square().mean()
        return total


def model_of(params: Iterable[ParamMeta], device: str, dtype: torch.dtype = torch.float32) -> Node:
    """Return a model with these parameters, of equal values on every rank."""
    root, generator = Node(), torch.Generator().manual_seed(3)
    for meta in params:
        *path, last = meta.name.split(".")
        node = root
        for name in path:
            if name not in dict(node.named_children()):
                node.add_module(name, Node())
            node = getattr(node, name)
        value = torch.randn(meta.shape, generator=generator).to(dtype)
        node.register_parameter(last, nn.Parameter(value.to(device)))
    return root


def sharded(model: Any, device: str) -> Any:
    """Apply FSDP2: every layer, and the rest."""
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for layer in model.model.layers.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
    model(torch.zeros((), device=device)).backward()
    optimizer.step()
    optimizer.zero_grad()


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trainer's own weights in bfloat16, cast where they lie; a collective where they are sharded."""
    whole = {n: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    return {name: tensor.to(torch.bfloat16).cpu() for name, tensor in whole.items()}


def backend(rank: int, device: str) -> RecipeBackend:
    recipe = shapes.tp_recipe(shapes.params_of(SHAPE), WORKERS, rank, kv_heads=SHAPE.kv_heads)
    return RecipeBackend(recipe, WorkerId("double", rank), WORKERS, device=device)


def live_bytes(one: RecipeBackend) -> dict[str, bytes]:
    live = one.live_tensors()
    return {name: t.cpu().contiguous().view(torch.uint8).numpy().tobytes() for name, t in live.items()}


def differences(engine: LocalEngine, whole: dict[str, torch.Tensor]) -> list[str]:
    """Return which live tensors are not, byte by byte, what loading these weights makes of them."""
    found = []
    for rank, receiver in enumerate(engine.receivers):
        expected = backend(rank, "cpu")
        expected.load(whole.items())
        own, right = live_bytes(receiver.backend), live_bytes(expected)  # type: ignore[arg-type]
        found += [f"worker {rank}: {name}" for name in right if own[name] != right[name]]
    return found


def train(
    rank: int, world_size: int, port: int, layout: str, device: str, engine_device: str
) -> tuple[list[str], list[int | None]]:
    """Train; return what was wrong in the engine after any step, and the steps that were reported."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    if layout != "plain":
        group: dict[str, Any] = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=60)}
        if device == "cuda":
            group["device_id"] = torch.device("cuda", rank)
        kind = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(kind, init_method=f"tcp://127.0.0.1:{port}", **group)
    model: Any = model_of(shapes.params_of(SHAPE), device)
    if layout != "plain":
        model = sharded(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    here = f"cuda:{rank}" if engine_device == "cuda" else "cpu"
    # Only rank 0 updates it; on the others it is never asked.
    engine = LocalEngine([backend(worker, here) for worker in range(WORKERS)])
    found, reports = [], []
    choices: dict[str, Any] = {"mode": "wait", "on_error": "raise", "dtype": "bfloat16", "report": reports.append}
    choices["update"] = UpdateSettings(verify="full")
    with fsdp.attach(model, optimizer, to=engine, **choices):
        for number in range(1, STEPS + 1):
            step(model, optimizer, device)
            whole = published(model)
            if rank == 0:
                found += [f"step {number}: {one}" for one in differences(engine, whole)]
    engine.close()
    if layout != "plain":
        dist.barrier()
        dist.destroy_process_group()
    return found, [report.step for report in reports]
