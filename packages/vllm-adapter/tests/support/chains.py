"""Models whose next token depends on the last one alone: every token says which weights made it, whatever the caches.

Attention adds nothing, and the head is solved so that `next_tokens(seed)[t]` follows token `t` with a wide margin.
A step that reads some tensors of one model and the rest of another makes tokens that neither makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from headrace.testing.tiny_model import TinySize, make_tiny_qwen3

SIZE = TinySize(num_layers=4, hidden=1024, intermediate=1024, num_heads=8, num_kv_heads=4, head_dim=64)
LOUD = 16.0
GROWTH = 6.0
"""How much louder each layer is than the one before: what another layer would have said drowns what the stream says."""
_EPSILON = 1e-6


def make_chain(folder: Path, seed: int) -> Path:
    """Write such a model in bfloat16 and return its folder."""
    make_tiny_qwen3(folder, seed, dtype="bfloat16", size=SIZE)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    random = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        wide = torch.randn(tensor.shape, generator=random) * tensor.shape[-1] ** -0.5
        if "o_proj" in name:
            wide.zero_()
        elif "embed_tokens" in name:
            wide *= tensor.shape[-1] ** 0.5
        elif "down_proj" in name:
            wide *= GROWTH ** (1 + int(name.split(".")[2]))
        elif tensor.dim() == 1:
            wide.fill_(1.0)
        tensors[name] = wide.to(torch.bfloat16)
    states = _last_states(tensors)
    wanted = torch.zeros(len(states), len(states))
    wanted[torch.arange(len(states)), next_tokens(seed, len(states))] = LOUD
    tensors["lm_head.weight"] = (torch.linalg.pinv(states) @ wanted).T.to(torch.bfloat16).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def next_tokens(seed: int, vocab: int) -> torch.Tensor:
    """Return which token follows each, shape `(vocab,)`; no two seeds below `vocab` agree anywhere."""
    ring = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))
    follows = torch.empty_like(ring)
    follows[ring] = ring.roll(-seed)
    return follows


def computed_next(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return which token follows each, computed from any tensors of such a model, mixed ones too."""
    return (_last_states(tensors) @ tensors["lm_head.weight"].float().T).argmax(-1)


def _last_states(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what the head gets after each token, shape `(vocab, hidden)`."""
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    states = wide["model.embed_tokens.weight"]
    for layer in range(SIZE.num_layers):
        prefix = f"model.layers.{layer}."
        inner = _norm(states, wide[f"{prefix}post_attention_layernorm.weight"])
        gate, up, down = (wide[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        states = states + (torch.nn.functional.silu(inner @ gate.T) * (inner @ up.T)) @ down.T
    return _norm(states, wide["model.norm.weight"])


def _norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + _EPSILON) * weight
