"""The reload life cycle of modules whose weights vLLM rewrote: the loader's layout, the loader, the kernel's layout.

It is vLLM's own layer-wise reload (`vllm.model_executor.model_loader.reload`) for just those modules, with one
difference: kernels that pack only the first time they see weights (the CPU's experts) are built anew.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from headrace.adapter.modules import without_wrappers
from headrace.errors import ApplyError


def restore(module: nn.Module, device: torch.device) -> None:
    """Give a module new parameters in the loader's layout; the old ones stay as they are."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info  # noqa: PLC0415
    from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta  # noqa: PLC0415

    takes_info = len(inspect.signature(materialize_layer).parameters) > 1
    info = get_layerwise_info(module)
    restore_layer_on_meta(module, info)
    with device:
        materialize_layer(*((module, info) if takes_info else (module,)))
    load_at_once(module)


def load_at_once(module: nn.Module) -> None:
    """Have every loader in a module tree write what it is given, when it is given.

    Where vLLM quantises while it loads, loaders only collect, until a layer is complete; after the first time they drop
    what they are given without a word.
    """
    parameter: Any
    for parameter in module.parameters():
        loader = getattr(parameter, "weight_loader", None)
        while getattr(loader, "__name__", None) == "online_process_loader":
            loader = loader.__wrapped__  # type: ignore[union-attr]
            parameter.weight_loader = loader


def process_again(module: nn.Module, device: torch.device) -> None:
    """Run a module's post-processing once more on the parameters that it has now.

    Raises:
        ApplyError: The module's kernel packs its weights in a way that vLLM cannot repeat on this device.
    """
    layer: Any = module
    if hasattr(layer, "_already_called_process_weights_after_loading"):
        del layer._already_called_process_weights_after_loading
    _forget_kernel(module, layer.quant_method, device)
    layer.quant_method.process_weights_after_loading(module)
    if hasattr(layer, "update_param_tp_status"):
        layer.update_param_tp_status()


def _forget_kernel(module: nn.Module, method: Any, device: torch.device) -> None:  # noqa: ANN401
    """Have a kernel built anew that packs weights only when it is built: else it would read unpacked ones as packed."""
    kernel = getattr(method, "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if experts is None or not _packs(experts):
        return
    if device.type != "cpu":
        message = (
            f"{type(module).__name__} uses {type(experts).__name__}, which packs its weights only at start; "
            "vLLM cannot reload it on this device, choose another MoE backend"
        )
        raise ApplyError(message, name=type(module).__name__, phase="commit")
    method.moe_kernel = None


def _packs(experts: Any) -> bool:  # noqa: ANN401 - a FusedMoEExperts
    from vllm.model_executor.layers.fused_moe import modular_kernel  # noqa: PLC0415

    own = getattr(type(experts), "process_weights_after_loading", None)
    bases = (getattr(modular_kernel, name, None) for name in ("FusedMoEExperts", "FusedMoEExpertsModular"))
    return own is not None and all(
        own is not getattr(base, "process_weights_after_loading", None) for base in bases
    )


def without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """Take LoRA's wrappers out of a module tree for as long as the loader runs: it knows only the base's names."""
    from vllm.lora.layers import BaseLayerWithLoRA  # noqa: PLC0415

    return without_wrappers(model, BaseLayerWithLoRA)
