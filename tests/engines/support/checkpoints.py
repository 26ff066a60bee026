"""Checkpoints that fit a model, and some that do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file


def checkpoints_of(family: str, folder: Path) -> dict[str, Path]:
    """Make `a`, `b` and `c` of one family, and of `b` a `partial` and a `misshapen` one."""
    made = {name: FAMILIES[family].make(folder, seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))}
    tensors = load_file(made["b"] / "model.safetensors")
    norm = next(name for name in tensors if name.endswith("norm.weight"))
    made["partial"] = _variant(made["b"], "partial", {k: v for k, v in tensors.items() if k != norm})
    made["misshapen"] = _variant(
        made["b"], "misshapen", tensors | {norm: torch.ones(tensors[norm].numel() + 1)}
    )
    return made


def _variant(source: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    target = source.with_name(f"{source.name}-{name}")
    shutil.copytree(source, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def make_adapter(base: Path, folder: Path, seed: int, rank: int = 8) -> Path:
    """Write a random LoRA adapter in peft's form for a base's query and value projections."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            rows, columns = weight.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * columns**-0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_adapter(base: Path, adapter: Path) -> Path:
    """Write what a base and an adapter compute together as a checkpoint of its own."""
    tensors = load_file(base / "model.safetensors")
    parts = load_file(adapter / "adapter_model.safetensors")
    for key in (key for key in parts if key.endswith("lora_A.weight")):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        tensors[name] += parts[key.replace("lora_A", "lora_B")] @ parts[key]
    return _variant(base, f"merged-{adapter.name}", tensors)


def add_guesser(base: Path, seed: int) -> Path:
    """Write a checkpoint of `base` with one layer for multi-token prediction more, as DeepSeek-V3's have it."""
    config = json.loads((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    last, width = config["num_hidden_layers"] - 1, config["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    stem, own = f"model.layers.{last}.", f"model.layers.{last + 1}."
    new = {own + name.removeprefix(stem): t for name, t in tensors.items() if name.startswith(stem)}
    new |= {f"{own}{name}.weight": torch.ones(width) for name in ("enorm", "hnorm", "shared_head.norm")}
    new |= {f"{own}eh_proj.weight": torch.ones(width, 2 * width)}
    noise = {name: torch.randn(t.shape, generator=generator) for name, t in sorted(new.items())}
    new = {name: (1 + 0.1 * t if t.ndim == 1 else t * t.shape[-1] ** -0.5) for name, t in noise.items()}
    # Copies of what the answering model has; vLLM shares that one instead.
    new[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    new[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    target = _variant(base, "guesser", tensors | new)
    (target / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return target
