"""Watches a vLLM model between construction and its first forward step: its skeleton, and what loading made of it.

vLLM rewrites weights after it has loaded them (packed, quantised, permuted kernels) and keeps things computed from
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

from headrace.recording import skeleton_of

logger = logging.getLogger(__name__)
_MAX_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Processed:
    """What post-processing did to one module.

    Attributes:
        rewrote: Parameters have another layout or other bytes than what the loader wrote.
        keeps: Attributes hold tensors computed from parameters (packed copies, kernel handles).
    """

    rewrote: bool
    keeps: bool


@dataclass(frozen=True)
class Watched:
    """A model as it was constructed.

    Attributes:
        twin: The same structure on the meta device, in the loader's layout.
        config: vLLM's configuration that it was built with; a draft's is another than its target's.
    """

    twin: nn.Module
    config: Any


_models: WeakKeyDictionary[nn.Module, Watched] = WeakKeyDictionary()
_processed: WeakKeyDictionary[nn.Module, Processed] = WeakKeyDictionary()


def watched(model: nn.Module) -> Watched | None:
    """Return what is known of a model, or None where it was built before the plug-in was loaded."""
    return _models.get(model)


def drafts_of(config: Any, model: nn.Module) -> list[nn.Module]:  # noqa: ANN401 - a VllmConfig
    """Return the draft models beside `model` in this process, in order of construction, inner ones left out.

    A draft's configuration is a changed copy of its target's, with another id and the same speculation.
    """
    speculation = config.speculative_config
    if speculation is None:
        return []
    found = [each for each, seen in _models.items() if seen.config.speculative_config is speculation]
    inner = {id(part) for each in found for part in each.modules() if part is not each}
    return [each for each in found if each is not model and id(each) not in inner]


def processed(module: nn.Module) -> Processed | None:
    """Return what post-processing did to a module, or None where it never ran."""
    return _processed.get(module)


def watch_model_loading() -> None:
    """Look at every model right after its construction, before its weights are loaded. Idempotent."""
    from vllm.model_executor.model_loader import utils  # noqa: PLC0415 - vLLM's own plug-in loading calls this

    original = utils.record_metadata_for_reloading
    if getattr(original, "_headrace", False):
        return

    @functools.wraps(original)
    def record_metadata_for_reloading(model: nn.Module) -> None:
        original(model)
        _constructed(model)

    record_metadata_for_reloading._headrace = True  # type: ignore[attr-defined]
    utils.record_metadata_for_reloading = record_metadata_for_reloading


def _constructed(model: nn.Module) -> None:
    from vllm.config import get_current_vllm_config  # noqa: PLC0415

    config = get_current_vllm_config()
    if not wanted(config):
        return
    _models[model] = Watched(skeleton_of(model), config)
    # A head that equals the embedding would become the same memory, and could never again differ from it.
    if getattr(config.model_config, "word_embeddings_untied_by_checkpoint", False):
        config.model_config.word_embeddings_untied_by_checkpoint = False
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if callable(getattr(method, "process_weights_after_loading", None)):
            _watch_method(method)


def wanted(config: Any) -> bool:  # noqa: ANN401 - a VllmConfig
    """Return whether an engine of this configuration takes updates from Headrace."""
    transfer = config.weight_transfer_config
    extension = config.parallel_config.worker_extension_cls or ""
    return (transfer is not None and transfer.backend == "headrace") or extension.startswith("headrace_vllm.")


def _watch_method(method: Any) -> None:  # noqa: ANN401 - a QuantizeMethodBase
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
