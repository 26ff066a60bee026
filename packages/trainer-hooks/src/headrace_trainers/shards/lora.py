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
    """Return the layers of peft that have LoRA adapters, by their cleaned name."""
    return {
        clean_name(f"{name}.").removesuffix("."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }


def base_name(name: str) -> str | None:
    """Return what the model without adapters calls a parameter of peft's model; None where it has none such."""
    if _LEFT_OUT.search(name):
        return None
    return _SAVED.sub(".", name.replace(_BASE, ".")).removeprefix("base_model.model.")


def merged_piece(name: str, layers: Mapping[str, Any], weight: torch.Tensor) -> Piece | None:
    """Return the piece that is a base weight with its active adapters merged, or None where none adapts it.

    Args:
        name: The weight's cleaned name in peft's model.
        layers: As `lora_layers` returns them.
        weight: Whole on this rank.

    Raises:
        ConfigError: The model is sharded, or an adapter's kind cannot be merged layer by layer.
    """
    prefix, _, rest = name.rpartition(_BASE)
    layer = layers.get(prefix)
    if layer is None or rest != "weight":
        return None
    problem = ""
    if isinstance(weight, DTensor) or hasattr(weight, "ds_tensor") or weight.dim() == 0:
        problem = "is sharded, and merging would need a gather; train adapters with DDP or ZeRO 0 to 2"
    elif any(getattr(layer, "use_dora", {}).values()):
        problem = "has a DoRA adapter; merge it yourself and publish the result"
    if problem:
        raise ConfigError(f"{name} {problem}", name=name)
    box = Box.whole(tuple(weight.shape))
    return Piece(name, box, lambda: _merged(layer), origin=lambda: layer.base_layer.weight)


def _merged(layer: Any) -> torch.Tensor:  # noqa: ANN401 - peft has no types
    weight: torch.Tensor = layer.base_layer.weight.detach()
    with torch.no_grad():
        for delta in _deltas(layer):
            weight = weight + delta.to(weight.dtype)
    return weight


def _deltas(layer: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401
    known = {*layer.lora_A, *getattr(layer, "lora_embedding_A", ())}
    for adapter in () if layer.merged else layer.active_adapters:
        if adapter in known:
            yield layer.get_delta_weight(adapter)
