"""Pieces of plain tensors, DTensors and flat ranges."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from headrace.errors import ConfigError
from headrace.geometry import Box, boxes_of_flat_range
from headrace.types import ParamMeta
from headrace_trainers.source import Piece


def meta_of(name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> ParamMeta:
    """Return a parameter's metadata; `shape` where the tensor is not whole."""
    kind = str(tensor.dtype).removeprefix("torch.")
    return ParamMeta(name, kind, tuple(tensor.shape) if shape is None else shape)


def whole_pieces(name: str, tensor: torch.Tensor) -> list[Piece]:
    """Return the piece of a tensor that lies here whole.

    Raises:
        ConfigError: It has no data here.
    """
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise ConfigError(f"{name} has no dense data (meta device or sparse); attach when it is loaded", name=name)
    return [Piece(name, Box.whole(tuple(tensor.shape)), lambda: tensor)] if tensor.numel() else []


def dtensor_pieces(name: str, tensor: DTensor) -> list[Piece]:
    """Return the piece of a DTensor (FSDP2, HSDP, tensor parallelism) that lies here; replicas are pieces too.

    Raises:
        ConfigError: Its placement is no box: a partial sum, or a strided shard that is not contiguous.
    """
    if any(placement.is_partial() for placement in tensor.placements):
        raise ConfigError(f"{name} is a partial sum, {tensor.placements}; it cannot be published", name=name)
    if tensor.device_mesh.get_coordinate() is None:
        return []
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if not prod(shape):
        return []
    local = tuple(tensor.to_local().shape)
    if local != tuple(shape):
        raise ConfigError(f"{name}: {tensor.placements} place {tuple(shape)} here, but {local} lies here", name=name)
    return [Piece(name, Box(tuple(offsets), tuple(shape)), tensor.to_local)]


def hidden_duplicate(tensor: DTensor, axes: frozenset[str]) -> bool:
    """Return whether another rank's copy of a DTensor stands for this rank's.

    With FSDP2 and tensor parallelism, norms and embeddings lie on the axis of data only, and every rank along the other
    axis has a copy that nobody calls a replica. That of coordinate 0 is the model's.

    Args:
        tensor: On a part of a larger mesh, or not.
        axes: Names of all axes that the model's DTensors lie on; others (pipeline stages) separate different models.
    """
    mesh = tensor.device_mesh
    root = mesh._get_root_mesh()
    own, coordinate = mesh.mesh_dim_names or (), root.get_coordinate() or ()
    return any(
        where and axis in axes and axis not in own
        for axis, where in zip(root.mesh_dim_names or (), coordinate, strict=False)
    )


def flat_pieces(
    name: str, shape: tuple[int, ...], first: int, last: int, flat: Callable[[], torch.Tensor]
) -> list[Piece]:
    """Return the pieces of elements `[first, last)` of a parameter's row-major order.

    Args:
        name: The parameter.
        shape: Its whole shape.
        first: First element that lies here.
        last: One past the last.
        flat: Returns the 1-D tensor whose element 0 is `first`.
    """
    pieces, begin = [], 0
    for box in boxes_of_flat_range(shape, first, last):
        end = begin + box.num_elements
        pieces.append(Piece(name, box, _slice(flat, begin, end, box.shape)))
        begin = end
    return pieces


def _slice(
    flat: Callable[[], torch.Tensor], begin: int, end: int, shape: tuple[int, ...]
) -> Callable[[], torch.Tensor]:
    return lambda: flat()[begin:end].view(shape)
