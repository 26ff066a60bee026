"""The models of one vLLM worker: the one that answers, and the draft models of speculative decoding beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from vllm.config import set_current_vllm_config

from headrace.adapter.part import Part
from headrace.adapter.watch import twin_of
from headrace.errors import BackendUnavailableError
from headrace_vllm.watch import config_of, drafts_of


class VllmPart(Part):
    """One model, with the configuration that it was built with."""

    @contextmanager
    def context(self) -> Iterator[None]:
        """Make the configuration that the model was built with vLLM's current one."""
        with set_current_vllm_config(config_of(self.model)), _incomplete():
            yield

    def deriving(self) -> list[tuple[str, nn.Module]]:
        """Return modules that hold something computed from parameters; attention is last, as in vLLM's own order."""
        found = super().deriving()
        known = {id(module) for _, module in found}
        attention = [
            (name, module)
            for name, module in self.modules()
            if id(module) not in known
            and _is_attention(module)
            and next(module.parameters(), None) is not None
        ]
        return found + attention


def parts_of(config: Any, model: nn.Module) -> list[Part]:  # noqa: ANN401 - a VllmConfig
    """Return the models of the worker that `model` answers for; that one is first.

    Raises:
        BackendUnavailableError: The model was built before the plug-in was loaded.
    """
    twin = twin_of(model)
    if twin is None:
        message = (
            "this model was built without Headrace's plug-in; start vLLM with "
            '--weight-transfer-config \'{"backend":"headrace"}\', or with --worker-extension-cls '
            "headrace_vllm.WorkerExtension, and do not exclude `headrace` from VLLM_PLUGINS"
        )
        raise BackendUnavailableError(message, name="vllm")
    others = {id(parameter) for parameter in model.parameters()}
    parts: list[Part] = [VllmPart(model, twin)]
    for number, draft in enumerate(drafts_of(config, model), start=1):
        prefix = "draft/" if number == 1 else f"draft{number}/"
        known = twin_of(draft)
        if known is not None:
            parts.append(VllmPart(draft, known, prefix, follows=_one_checkpoint(config), others=others))
    return parts


def _one_checkpoint(config: Any) -> bool:  # noqa: ANN401 - a VllmConfig
    """Return whether the draft was read from the checkpoint of the model that answers (MTP layers lie there)."""
    draft = getattr(config.speculative_config, "draft_model_config", None)
    own = config.model_config
    return draft is not None and (draft.model, draft.revision) == (own.model, own.revision)


@contextmanager
def _incomplete() -> Iterator[None]:
    """Let a draft's loader take the part of its weights that goes through it."""
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check  # noqa: PLC0415
    except ImportError:  # an older vLLM
        yield
        return
    with disable_mtp_completeness_check():
        yield


def _is_attention(module: nn.Module) -> bool:
    """Return whether vLLM has a module process its weights after all others."""
    from vllm.model_executor.layers import attention  # noqa: PLC0415 - heavy, and only here

    asked = getattr(attention, "is_deferred_attention_layer", None)
    if asked is not None:
        return bool(asked(module))
    kinds = (attention.Attention, attention.MLAAttention, attention.MMEncoderAttention)  # vLLM before 0.29
    return isinstance(module, kinds) and hasattr(module, "process_weights_after_loading")
