"""LoRA adapters of peft, merged into the weights that they adapt, in the moment in which these are copied out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from headrace.errors import ConfigError
from headrace.geometry import Box
from headrace_trainers.shards.names import clean_name
from headrace_trainers.source import Piece

_BASE = ".base_layer."
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")
_LEFT_OUT = re.compile(r"\.(lora_[A-Za-z_]+|original_module)\.")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of peft that have LoRA adapters, by their cleaned name.

    Raises:
        ConfigError: peft adapts a layer in a way that cannot be merged layer by layer.
    """
    found = {
        clean_name(f"{name}.").removesuffix("."): module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters")
    }
    for name, layer in found.items():
        if kind := _unmergeable(layer):
            message = f"{name} has {kind}; merge it yourself and publish the result"
            raise ConfigError(message, name=name)
    return found


def _unmergeable(layer: Any) -> str:  # noqa: ANN401 - peft has no types
    """Return which adapter of a layer is not one that is added to its weight, or nothing."""
    variants = {type(variant).__name__ for variant in getattr(layer, "lora_variant", {}).values()}
    if any(getattr(layer, "use_dora", {}).values()) or variants:
        return f"an adapter that is no plain LoRA but a variant, such as DoRA ({', '.join(sorted(variants))})"
    if not hasattr(layer, "lora_A"):
        return f"an adapter of another kind than LoRA ({type(layer).__name__})"
    if hasattr(layer, "parameter_name") or not hasattr(layer.base_layer, "weight"):
        return f"a {type(layer).__name__}, which changes parameters while a forward runs"
    return ""


def base_name(name: str) -> str | None:
    """Return what the model without adapters calls a parameter of peft's model; None where it has none such."""
    if _LEFT_OUT.search(name):
        return None
    return _SAVED.sub(".", name.replace(_BASE, ".")).removeprefix("base_model.model.")


def merged_piece(name: str, layers: Mapping[str, Any], parameter: torch.Tensor) -> Piece | None:
    """Return the piece that is a base weight or bias with its active adapters merged, or None where none adapts it.

    Args:
        name: The parameter's cleaned name in peft's model.
        layers: As `lora_layers` returns them.
        parameter: Whole on this rank.

    Raises:
        ConfigError: The model is sharded or quantised.
    """
    prefix, _, kind = name.rpartition(_BASE)
    layer = layers.get(prefix)
    if layer is None or not (kind == "weight" or (kind == "bias" and any(layer.lora_bias.values()))):
        return None
    problem = ""
    if isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor") or parameter.dim() == 0:
        problem = "is sharded, and merging would need a gather; train adapters with DDP or ZeRO 0 to 2"
    elif not parameter.is_floating_point():
        problem = f"is quantised ({parameter.dtype}); merge its adapter yourself and publish the result"
    if problem:
        raise ConfigError(f"{name} {problem}", name=name)
    box = Box.whole(tuple(parameter.shape))
    return Piece(name, box, lambda: _merged(layer, kind), origin=lambda: getattr(layer.base_layer, kind))


def _merged(layer: Any, kind: str) -> torch.Tensor:  # noqa: ANN401 - peft has no types
    merged: torch.Tensor = getattr(layer.base_layer, kind).detach()
    with torch.no_grad():
        for delta in _deltas(layer, kind):
            merged = merged + delta.to(merged.dtype)
    return merged


def _deltas(layer: Any, kind: str) -> Iterator[torch.Tensor]:  # noqa: ANN401
    known = {*layer.lora_A, *getattr(layer, "lora_embedding_A", ())}
    for adapter in () if layer.merged else layer.active_adapters:
        if adapter not in known:
            continue
        if kind == "weight":
            yield layer.get_delta_weight(adapter)
        elif layer.lora_bias[adapter]:
            yield layer.lora_B[adapter].bias * layer.scaling[adapter]
