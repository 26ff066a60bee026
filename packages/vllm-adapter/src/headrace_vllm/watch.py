"""Watches vLLM models being built: their skeletons, what loading made of them, and which configuration each has."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from headrace.adapter.receivers import reserve
from headrace.adapter.watch import watch
from headrace_vllm.reload import load_at_once

_configs: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def config_of(model: nn.Module) -> Any:  # noqa: ANN401 - a VllmConfig
    """Return the configuration that a watched model was built with; a draft's is another than its target's."""
    return _configs[model]


def drafts_of(config: Any, model: nn.Module) -> list[nn.Module]:  # noqa: ANN401 - a VllmConfig
    """Return the draft models beside `model` in this process, in order of construction, inner ones left out.

    A draft's configuration is a changed copy of its target's, with another id and the same speculation.
    """
    speculation = config.speculative_config
    if speculation is None:
        return []
    found = [each for each, own in _configs.items() if own.speculative_config is speculation]
    inner = {id(part) for each in found for part in each.modules() if part is not each}
    return [each for each in found if each is not model and id(each) not in inner]


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


def wanted(config: Any) -> bool:  # noqa: ANN401 - a VllmConfig
    """Return whether an engine of this configuration takes updates from Headrace."""
    transfer = config.weight_transfer_config
    extension = config.parallel_config.worker_extension_cls or ""
    return (transfer is not None and transfer.backend == "headrace") or extension.startswith("headrace_vllm.")


def _constructed(model: nn.Module) -> None:
    from vllm.config import get_current_vllm_config  # noqa: PLC0415

    config = get_current_vllm_config()
    if not wanted(config):
        return
    load_at_once(watch(model))
    reserve(model)
    _configs[model] = config
    # A head that equals the embedding would become the same memory, and could never again differ from it.
    if getattr(config.model_config, "word_embeddings_untied_by_checkpoint", False):
        config.model_config.word_embeddings_untied_by_checkpoint = False
