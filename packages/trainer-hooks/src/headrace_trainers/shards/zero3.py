"""Pieces of DeepSpeed ZeRO-3: the range of every parameter's flat order that this rank keeps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from headrace.errors import ConfigError
from headrace.types import ParamMeta
from headrace_trainers.shards.tensors import flat_pieces, meta_of
from headrace_trainers.source import Piece


def is_zero3(parameter: torch.Tensor) -> bool:
    """Return whether DeepSpeed has partitioned a parameter."""
    return hasattr(parameter, "ds_tensor") and hasattr(parameter, "ds_shape")


def zero3_pieces(name: str, parameter: Any) -> tuple[ParamMeta, list[Piece]]:  # noqa: ANN401 - DeepSpeed adds attributes
    """Return a partitioned parameter's metadata and what of it lies here, on the GPU or offloaded to the host.

    The last rank's partition is shorter than the others, or empty. It is kept whether the parameter is gathered or not.

    Raises:
        ConfigError: The partition is not in memory (offloaded to NVMe).
    """
    shard, shape = parameter.ds_tensor, tuple(parameter.ds_shape)
    if shard.numel() == 0 and parameter.ds_numel:
        message = f"{name} is offloaded to a disk; set offload_param to none or cpu"
        raise ConfigError(message, name=name)
    size, rank = shard.ds_numel, dist.get_rank(parameter.ds_process_group)
    first, last = min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)
    pieces = flat_pieces(name, shape, first, last, lambda: parameter.ds_tensor.data.view(-1))
    return meta_of(name, shard, shape), pieces
