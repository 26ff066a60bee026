"""An engine's model as Headrace names it: parameters and loadable buffers, without the wrappers of LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from headrace.types import DTYPE_CODES

_BASE_LAYER = ".base_layer."


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters by the loader's names, tied ones under their first."""
    return {bare_name(name): tensor for name, tensor in model.named_parameters()}


def loadable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers of dtypes that Headrace can move, tied ones under their first name."""
    kept = {
        f"{path}." if path else "": module._non_persistent_buffers_set
        for path, module in model.named_modules()
    }
    buffers = {
        bare_name(name): tensor
        for name, tensor in model.named_buffers()
        if name.rpartition(".")[2] not in kept.get(name[: len(name) - len(name.rpartition(".")[2])], set())
    }
    tensors = parameters(model) | buffers
    return {name: t for name, t in tensors.items() if str(t.dtype).removeprefix("torch.") in DTYPE_CODES}


def layouts(module: nn.Module) -> dict[str, object]:
    """Return shape, dtype and strides of a module's own parameters."""
    return {name: (p.shape, p.dtype, p.stride()) for name, p in module._parameters.items() if p is not None}


@contextmanager
def without_wrappers(model: nn.Module, wrapper: type[nn.Module]) -> Iterator[None]:
    """Take LoRA's wrappers out of a module tree for as long as the loader runs: it knows only the base's names."""
    taken: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            base = getattr(child, "base_layer", None)
            if isinstance(child, wrapper) and isinstance(base, nn.Module):
                taken.append((parent, name, child))
    try:
        for parent, name, child in taken:
            parent._modules[name] = child.base_layer  # type: ignore[assignment]
        yield
    finally:
        for parent, name, child in taken:
            parent._modules[name] = child


def bare_name(name: str) -> str:
    """Return a name without LoRA's wrappers, as the loader knows it."""
    return name.replace(_BASE_LAYER, ".")
