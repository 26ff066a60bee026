"""Trainers of torch itself: plain, DDP, FSDP2, HSDP, FSDP2 with tensor parallelism, FSDP1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
from torch.distributed.fsdp import MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from trainer_world import Trainer, load, optimizer_of, plain_step


def _trainer(model: Any) -> Trainer:
    optimizer = optimizer_of(model)
    return Trainer(model, plain_step(model, optimizer), optimizer)


def plain(folder: Path) -> Trainer:
    """No wrapper: every rank trains alone, on the same batches."""
    return _trainer(load(folder))


def ddp(folder: Path) -> Trainer:
    """Replicas."""
    return _trainer(nn.parallel.DistributedDataParallel(load(folder)))


def _shard(model: Any, mesh: DeviceMesh, **options: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp2(folder: Path) -> Trainer:
    """One axis; weights in float32."""
    return _trainer(_shard(load(folder), init_device_mesh("cpu", (dist.get_world_size(),))))


def fsdp2_mixed(folder: Path) -> Trainer:
    """Masters in float32, computing in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return _trainer(_shard(load(folder), init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy))


def fsdp2_checkpointed(folder: Path) -> Trainer:
    """Activations computed again, by the wrapper that changes names."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = load(folder)
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    return _trainer(_shard(model, init_device_mesh("cpu", (dist.get_world_size(),))))


def hsdp(folder: Path) -> Trainer:
    """Replicas of shards."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return _trainer(_shard(load(folder), mesh))


def fsdp2_tp(folder: Path) -> Trainer:
    """Two axes: strided shards; norms and embeddings only on the axis of data."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = load(folder)
    for layer in model.model.layers:
        columns = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        columns |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        rows = {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(layer, mesh["tp"], columns | rows)
    return _trainer(_shard(model, mesh["dp"]))


def _fsdp1(strategy: ShardingStrategy, *, use_orig_params: bool) -> Callable[[Path], Trainer]:
    def make(folder: Path) -> Trainer:
        model = load(folder)
        mesh = None
        if strategy in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2):
            mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        wrapped = Fsdp(
            model,
            sharding_strategy=strategy,
            auto_wrap_policy=ModuleWrapPolicy({type(model.model.layers[0])}),
            device_id=torch.device("cpu"),
            use_orig_params=use_orig_params,
            device_mesh=mesh,
        )
        return _trainer(wrapped)

    return make


LAYOUTS: dict[str, Callable[[Path], Trainer]] = {
    "fsdp2": fsdp2,
    "fsdp2-mixed": fsdp2_mixed,
    "fsdp2-checkpointed": fsdp2_checkpointed,
    "hsdp": hsdp,
    "fsdp2-tp": fsdp2_tp,
    "ddp": ddp,
    "plain": plain,
    "fsdp1-full": _fsdp1(ShardingStrategy.FULL_SHARD, use_orig_params=False),
    "fsdp1-full-orig": _fsdp1(ShardingStrategy.FULL_SHARD, use_orig_params=True),
    "fsdp1-grad-op": _fsdp1(ShardingStrategy.SHARD_GRAD_OP, use_orig_params=True),
    "fsdp1-none": _fsdp1(ShardingStrategy.NO_SHARD, use_orig_params=False),
    "fsdp1-hybrid": _fsdp1(ShardingStrategy.HYBRID_SHARD, use_orig_params=True),
    "fsdp1-hybrid-2": _fsdp1(ShardingStrategy._HYBRID_SHARD_ZERO2, use_orig_params=True),
}
