"""The reload life cycle of modules whose weights vLLM rewrote: the loader's layout, the loader, the kernel's layout.

It is vLLM's own layer-wise reload (`vllm.model_executor.model_loader.reload`) for just those modules, with one
difference: kernels that pack only the first time they see weights (the CPU's experts) are built anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from headrace.errors import ApplyError


class ModuleReload:
    """One run of the life cycle. Used by the backend: `begin`, the engine's loader, `end`; the engine is paused.

    Needs memory for a second copy of the modules' parameters between `begin` and `end`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []

    def begin(self, modules: Sequence[nn.Module]) -> None:
        """Give modules parameters in the loader's layout, and keep those that the kernels read. May be repeated."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info  # noqa: PLC0415
        from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta  # noqa: PLC0415

        takes_info = len(inspect.signature(materialize_layer).parameters) > 1
        begun = {id(module) for module, _, _ in self._kept}
        for module in (module for module in modules if id(module) not in begun):
            self._kept.append((module, dict(module._parameters), dict(module._buffers)))
            info = get_layerwise_info(module)
            restore_layer_on_meta(module, info)
            with self._device:
                materialize_layer(*((module, info) if takes_info else (module,)))

    def end(self) -> None:
        """Process what was loaded, and put it where the kernels have always read it."""
        for module, parameters, buffers in self._kept:
            process_again(module, self._device)
            for name, old in parameters.items():
                _put_back(module, name, old)
            module._buffers.update(buffers)
        self._kept = []

    def abandon(self) -> None:
        """Put the old parameters back after a failure; their bytes are still those from before."""
        for module, parameters, buffers in self._kept:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        self._kept = []


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


def _put_back(module: nn.Module, name: str, old: nn.Parameter | None) -> None:
    """Copy the new bytes into the old parameter where they fit, so that pointers which kernels hold stay."""
    new = module._parameters.get(name)
    if old is None or new is None or new is old:
        return
    if (old.shape, old.dtype, old.stride()) == (new.shape, new.dtype, new.stride()):
        old.data.copy_(new.data)
        module._parameters[name] = old


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Take LoRA's wrappers out of a module tree for as long as the loader runs: it knows only the base's names."""
    from vllm.lora.layers import BaseLayerWithLoRA  # noqa: PLC0415

    taken: list[tuple[nn.Module, str, Any]] = []
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, BaseLayerWithLoRA) and isinstance(
                getattr(child, "base_layer", None), nn.Module
            ):
                taken.append((parent, name, child))
    try:
        for parent, name, child in taken:
            parent._modules[name] = child.base_layer
        yield
    finally:
        for parent, name, child in taken:
            parent._modules[name] = child
