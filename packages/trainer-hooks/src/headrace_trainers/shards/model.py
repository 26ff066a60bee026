"""Shards of a whole model, whatever mixture of wrappers made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
from torch.distributed.tensor import DTensor

from headrace.errors import ConfigError
from headrace.types import ParamMeta
from headrace_trainers.shards.fsdp1 import fsdp1_pieces
from headrace_trainers.shards.lora import base_name, lora_layers, merged_piece
from headrace_trainers.shards.names import clean_name
from headrace_trainers.shards.tensors import dtensor_pieces, hidden_duplicate, meta_of, whole_pieces
from headrace_trainers.shards.zero3 import is_zero3, zero3_pieces
from headrace_trainers.source import Piece, Shards

Rename = Callable[[str], str | None]


def shards_of(model: nn.Module, rename: Rename | None = None) -> Shards:
    """Return what this rank holds of `model`. No collective, no copy; call it before or between forwards.

    Parameters and persistent buffers, under every name that they have; a tied tensor is a piece under each. A model of
    peft has the names and weights of its base model, LoRA adapters merged.

    Args:
        model: Plain, or wrapped by DDP, FSDP1, `fully_shard`, DeepSpeed, tensor parallelism, `torch.compile` or
            activation checkpointing.
        rename: From cleaned names to checkpoint names; None leaves a parameter out.

    Raises:
        ConfigError: A parameter cannot be published; names it.
    """
    params: list[ParamMeta] = []
    pieces: list[Piece] = []
    for meta, own in _everything(model):
        name = meta.name if rename is None else rename(meta.name)
        if name is not None:
            params.append(ParamMeta(name, meta.dtype, meta.shape))
            pieces += [replace(piece, name=name) for piece in own]
    return Shards(tuple(params), tuple(pieces))


def _everything(model: nn.Module) -> Iterator[tuple[ParamMeta, list[Piece]]]:
    layers = lora_layers(model)
    if not layers:
        yield from _as_they_are(model, {})
        return
    for meta, own in _as_they_are(model, layers):
        name = base_name(meta.name)
        if name is not None:
            yield replace(meta, name=name), own


def _as_they_are(model: nn.Module, layers: Mapping[str, Any]) -> Iterator[tuple[ParamMeta, list[Piece]]]:
    _reshard(model)
    flat = {meta.name: (meta, own) for meta, own in fsdp1_pieces(model)} if _has_fsdp1(model) else {}
    if flat and layers:
        raise ConfigError("LoRA adapters under FSDP1 cannot be merged without a gather; use DDP or ZeRO 0 to 2")
    yield from flat.values()
    axes = frozenset(axis for p in model.parameters() if isinstance(p, DTensor) for axis in _axes(p))
    for wrapped, parameter in model.named_parameters(remove_duplicate=False):
        name = clean_name(wrapped)
        merged = merged_piece(name, layers, parameter) if layers else None
        if merged is not None:
            yield meta_of(name, parameter), [merged]
        elif name not in flat and not name.endswith("_flat_param"):
            yield _of_parameter(name, parameter, axes)
    for wrapped, buffer in _persistent_buffers(model):
        yield _of_parameter(clean_name(wrapped), buffer, axes)


def _reshard(model: nn.Module) -> None:
    """Put DTensors back where a forward without gradients has left FSDP2's gathered parameters. No collective."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _axes(tensor: DTensor) -> tuple[str, ...]:
    return tensor.device_mesh.mesh_dim_names or ()


def _of_parameter(
    name: str,
    tensor: Any,  # noqa: ANN401 - of any framework
    axes: frozenset[str],
) -> tuple[ParamMeta, list[Piece]]:
    if is_zero3(tensor):
        return zero3_pieces(name, tensor)
    if isinstance(tensor, DTensor):
        return meta_of(name, tensor), [] if hidden_duplicate(tensor, axes) else dtensor_pieces(name, tensor)
    return meta_of(name, tensor), whole_pieces(name, tensor)


def _has_fsdp1(model: nn.Module) -> bool:
    return any(isinstance(module, Fsdp) for module in model.modules())


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the buffers that a checkpoint has."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
