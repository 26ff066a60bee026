"""A quantisation that vLLM does while it loads, for CPUs: int8, a scale per matrix, by vLLM's own machinery for it.

vLLM's own ones (`quantization="fp8"`) have no kernels for CPUs without AMX. Importing this registers `rounding`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import replace_parameter


class RoundingLinear(LinearMethodBase):
    """Holds int8 and a scale; the loader's weights are on the meta device until all of a layer are there."""

    uses_meta_device = True

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = ModelWeightParameter(
            data=torch.empty(shape, device="meta", dtype=params_dtype), input_dim=1, output_dim=0,
            weight_loader=extra_weight_attrs.get("weight_loader"),
        )  # fmt: skip
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        scale = layer.weight.abs().amax().float() / 127
        replace_parameter(layer, "weight", (layer.weight.float() / scale).round().to(torch.int8).t())
        replace_parameter(layer, "weight_scale", scale.view(1))
        layer._already_called_process_weights_after_loading = True

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        wide = layer.weight.to(x.dtype) * layer.weight_scale.to(x.dtype)
        made = x @ wide
        return made if bias is None else made + bias


@register_quantization_config("rounding")
class RoundingConfig(QuantizationConfig):
    """Rounds all linear layers; attention has scales that no checkpoint has."""

    def get_name(self) -> str:
        return "rounding"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, _config: dict[str, Any]) -> RoundingConfig:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, _prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            return RoundingLinear()
        return BaseKVCacheMethod(self) if isinstance(layer, Attention) else None
