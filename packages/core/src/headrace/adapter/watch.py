"""Watches an engine's model between construction and its first forward step: its skeleton, and what loading made of it.

Engines rewrite weights after they have loaded them (packed, quantised, permuted kernels) and keep things computed from
them. Both are told here from what `process_weights_after_loading` really did to each module, not from lists of names.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from headrace.adapter.modules import layouts
from headrace.recording import skeleton_of

logger = logging.getLogger(__name__)
_MAX_DEPTH = 4
_SMALL_NUMEL = 16


@dataclass(frozen=True, slots=True)
class Processed:
    """What post-processing did to one module.

    Attributes:
        rewrote: Parameters have another layout or other bytes than what the loader wrote.
        keeps: Attributes hold tensors computed from parameters (packed copies, kernel handles).
    """

    rewrote: bool
    keeps: bool


_twins: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
_processed: WeakKeyDictionary[nn.Module, Processed] = WeakKeyDictionary()
_constructed: WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()


def watch(model: nn.Module) -> nn.Module:
    """Return the skeleton of a model that was just constructed; notes what post-processing will do to its modules."""
    twin = _twins[model] = skeleton_of(model)
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if callable(getattr(method, "process_weights_after_loading", None)):
            _constructed[module] = _small(module)
            _watch_method(method)
    return twin


def twin_of(model: nn.Module) -> nn.Module | None:
    """Return a model as it was constructed, on the meta device; None where it was built before anybody watched."""
    return _twins.get(model)


def constructed(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's scalars and their like as it was constructed: not every checkpoint has its scales."""
    return _constructed.get(module, {})


def processed(module: nn.Module) -> Processed | None:
    """Return what post-processing did to a module, or None where it never ran."""
    return _processed.get(module)


def was_rewritten(module: nn.Module, twin: nn.Module | None) -> bool:
    """Return whether a module's parameters are not what the loader wrote."""
    note = processed(module)
    return (note is not None and note.rewrote) or (twin is not None and layouts(module) != layouts(twin))


def _small(module: nn.Module) -> dict[str, torch.Tensor]:
    own = ((name, p) for name, p in module._parameters.items() if p is not None and not p.is_meta)
    return {name: p.detach().clone() for name, p in own if p.numel() <= _SMALL_NUMEL}


def _watch_method(method: Any) -> None:  # noqa: ANN401 - the engine's quantisation method
    """Have a module's post-processing noted the first time it runs."""
    original = method.process_weights_after_loading
    if getattr(original, "_headrace", False):
        return

    @functools.wraps(original)
    def process_weights_after_loading(layer: nn.Module) -> None:
        if layer in _processed:
            original(layer)
        else:
            _note(layer, method, original)

    process_weights_after_loading._headrace = True  # type: ignore[attr-defined]
    method.process_weights_after_loading = process_weights_after_loading


def _note(layer: nn.Module, method: Any, original: Callable[[nn.Module], None]) -> None:  # noqa: ANN401
    had = {name: p for name, p in layer._parameters.items() if p is not None}
    before = {name: (p, None if p.is_meta else p.detach().clone()) for name, p in had.items()}
    attributes = _attributes(layer, method)
    original(layer)
    rewrote = before.keys() != {name for name, p in layer._parameters.items() if p is not None} or any(
        copy is None or not _unchanged(copy, layer._parameters[name]) for name, (_, copy) in before.items()
    )
    own = {id(p) for p in layer._parameters.values()} | {id(p) for p, _ in before.values()}
    storages = {
        p.untyped_storage().data_ptr() for p in layer._parameters.values() if p is not None and p.numel()
    }
    new = [value for key, value in _attributes(layer, method).items() if attributes.get(key) is not value]
    tensors = [t for value in new for t in _tensors_in(value, _MAX_DEPTH, set())]
    keeps = any(id(t) not in own and t.untyped_storage().data_ptr() not in storages for t in tensors)
    _processed[layer] = Processed(rewrote, keeps)
    logger.debug("%s: rewrote %s, keeps %s", type(layer).__name__, rewrote, keeps)


def _attributes(layer: nn.Module, method: Any) -> dict[str, Any]:  # noqa: ANN401
    hidden = ("_parameters", "_buffers", "_modules")
    own = {f"layer.{key}": value for key, value in vars(layer).items() if key not in hidden}
    return own | {f"method.{key}": value for key, value in getattr(method, "__dict__", {}).items()}


def _unchanged(before: torch.Tensor, after: torch.Tensor | None) -> bool:
    if after is None or after.is_meta:
        return False
    same = (before.shape, before.dtype, before.stride()) == (after.shape, after.dtype, after.stride())
    return same and torch.equal(_bits(before), _bits(after.detach()))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()]) if tensor.element_size() in kinds else tensor


def _tensors_in(value: Any, depth: int, seen: set[int]) -> Iterator[torch.Tensor]:  # noqa: ANN401
    """Yield tensors that a value holds: in containers, closures and plain objects, not in modules."""
    if id(value) in seen or depth < 0 or isinstance(value, nn.Module | ModuleType | type | str | int | float):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    for part in _parts(value):
        yield from _tensors_in(part, depth - 1, seen)


def _parts(value: Any) -> list[Any]:  # noqa: ANN401
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, functools.partial):
        return [*value.args, *value.keywords.values()]
    closure = getattr(value, "__closure__", None)
    if closure is not None:
        return [cell.cell_contents for cell in closure if _filled(cell)]
    return list(getattr(value, "__dict__", {}).values())


def _filled(cell: Any) -> bool:  # noqa: ANN401
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
