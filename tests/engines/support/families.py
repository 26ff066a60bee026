"""Tiny models of families that engines load in different ways: one entry per way, made by transformers from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.testing.tiny_model import make_tiny

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
_HAS_AMX = "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
_MLA_ENGINE = {"attention_backend": "CPU_MLA"} if _HAS_AMX else {}
"""vLLM takes its attention for AMX wherever a CPU has it, also in float32, which that one does not know."""
_UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
_MLA = {
    **_COMMON,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}


@dataclass(frozen=True)
class Family:
    """One family: `kind` is transformers' model type.

    Attributes:
        packed: Whether vLLM's CPU kernels, as installed, run it rightly at all.
        rewritten: Whether vLLM rewrites some of its weights on plain kernels too.
        sglang: Whether SGLang runs it on a CPU without kernels of its own.
    """

    name: str
    kind: str
    extents: Mapping[str, Any]
    tie: bool = False
    packed: bool = True
    rewritten: bool = False
    sglang: bool = True
    engine: Mapping[str, Any] = field(default_factory=dict)

    def make(self, folder: Path, seed: int) -> Path:
        """Write the model of one seed."""
        return make_tiny(self.kind, folder / f"{self.name}-{seed}", seed, self.extents, tie=self.tie)


FAMILIES = {
    family.name: family
    for family in (
        Family("qwen3", "qwen3", _COMMON),
        Family("llama", "llama", _COMMON),
        Family("llama-tied", "llama", _COMMON, tie=True),
        Family(
            "qwen3-moe",
            "qwen3_moe",
            {
                **_COMMON,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 96,
                "norm_topk_prob": True,
            },
        ),
        Family(
            "gemma2",
            "gemma2",
            {
                **_COMMON,
                "query_pre_attn_scalar": 32,
                "sliding_window": 256,
                "hidden_act": "gelu_pytorch_tanh",
                **_UNCAPPED,
            },
            tie=True,
        ),
        Family(
            "mixtral",
            "mixtral",
            {**_COMMON, "hidden_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        Family("phi3", "phi3", {**_COMMON, "hidden_size": 128, "rope_scaling": None}),
        Family("gpt2", "gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}, tie=True),
        Family(
            "deepseek-v2",
            "deepseek_v2",
            {**_MLA, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
            packed=False,
            rewritten=True,
            sglang=False,
            engine=_MLA_ENGINE,
        ),
        Family(
            "deepseek-v3",
            "deepseek_v3",
            {
                **_MLA,
                "q_lora_rank": 32,
                "n_group": 2,
                "topk_group": 1,
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
            },
            packed=False,
            rewritten=True,
            sglang=False,
            engine=_MLA_ENGINE,
        ),
        Family(
            "gpt-oss",
            "gpt_oss",
            {
                **_COMMON,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 64,
                "intermediate_size": 64,
            },
            sglang=False,
        ),
    )
}
