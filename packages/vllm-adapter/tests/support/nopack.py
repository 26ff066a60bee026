"""Makes vLLM on a CPU keep live weights in its parameters, as it does on CUDA: no oneDNN or AMX packing.

Import it before a model is loaded. It also repairs two faults of vLLM 0.32 that only CPUs have: a router's bias is
dropped, and rotary embedding turns one head only where the query has three dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
import vllm.model_executor.layers.utils as layer_utils
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight, bias)


def _dispatch(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = _linear


def _activate(name: str, hidden: torch.Tensor) -> torch.Tensor:
    if name == "swigluoai":
        gate, up = hidden[..., ::2].clamp(max=7.0), hidden[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = hidden.chunk(2, -1)
    kinds = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}
    return kinds[name](gate) * up


def _apply(
    self: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, activation: Any,
    global_num_experts: Any, expert_map: Any, a1q_scale: Any, a2_scale: Any, workspace13: Any, workspace2: Any,
    expert_tokens_meta: Any, apply_router_weight_on_input: Any,
) -> None:  # fmt: skip
    ids = topk_ids.long()
    if expert_map is not None:
        ids = expert_map.long()[ids]
    total = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        biases = [None if b is None else b[expert].float() for b in (self.w1_bias, self.w2_bias)]
        hidden = F.linear(hidden_states[token].float(), w1[expert].float(), biases[0])
        made = F.linear(_activate(activation.value, hidden), w2[expert].float(), biases[1])
        weighted = made if apply_router_weight_on_input else made * topk_weights[token, slot].float()[:, None]
        total.index_add_(0, token, weighted)
    output.copy_(total)


def _no_packing(self: Any, layer: Any) -> None:
    self._use_zentorch = False


_route = CPURouter._compute_routing


def _route_with_bias(
    self: Any, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
) -> Any:
    bias, scoring = self.e_score_correction_bias, self.scoring_func
    known = not self.use_grouped_topk and self.custom_routing_function is None
    if not known or scoring not in ("softmax", "sigmoid") or (bias is None and scoring == "softmax"):
        return _route(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
    scores = router_logits.float().softmax(-1) if scoring == "softmax" else router_logits.float().sigmoid()
    ids = (scores if bias is None else scores + bias.float()[None]).topk(self.top_k, -1).indices
    weights = scores.gather(1, ids)
    if self.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights * self.routed_scaling_factor).contiguous(), ids.to(torch.int32).contiguous()


_rope = RotaryEmbedding.forward_cpu


def _rotate(self: Any, positions: Any, query: Any, key: Any = None, *args: Any, **kwargs: Any) -> Any:
    if query.dim() == 3:
        return self.forward_native(positions, query, key, *args, **kwargs)
    return _rope(self, positions, query, key, *args, **kwargs)


class Unpacked:
    """Worker extension that does nothing but import this module in every worker, before the model is built."""


layer_utils.dispatch_cpu_unquantized_gemm = _dispatch
for _experts in (cpu_moe.CPUUnquantizedExperts, cpu_moe.X86CPUUnquantizedExperts):
    _experts.process_weights_after_loading = _no_packing
    _experts.apply = _apply
CPURouter._compute_routing = _route_with_bias
RotaryEmbedding.forward_cpu = _rotate
