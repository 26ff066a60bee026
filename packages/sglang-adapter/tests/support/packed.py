"""Makes SGLang's linear layers repack their weights after loading, as its kernels for AMX or FP8 do; import it early.

Row-parallel layers keep a packed copy beside the weight; all others hold the packed weight alone, whose loader is gone.
SGLang applies this in every process that imports it before SGLang loads its plug-ins.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import nn

_METHOD = "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod"


def _pack(_result: object, _method: object, layer: Any) -> None:
    from sglang.srt.layers.linear import RowParallelLinear

    packed = layer.weight.data.t().contiguous()
    if isinstance(layer, RowParallelLinear):
        layer.packed = packed
    else:
        layer.weight = nn.Parameter(packed, requires_grad=False)


def _apply(_method: object, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    made = x @ getattr(layer, "packed", layer.weight)
    return made if bias is None else made + bias


HookRegistry.register(f"{_METHOD}.process_weights_after_loading", _pack, HookType.AFTER)
HookRegistry.register(f"{_METHOD}.apply", _apply, HookType.REPLACE)
