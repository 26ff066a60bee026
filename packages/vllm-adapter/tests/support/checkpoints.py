"""Checkpoints that fit a model, and some that do not."""

from __future__ import annotations

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
    made["misshapen"] = _variant(made["b"], "misshapen", tensors | {norm: torch.ones(tensors[norm].numel() + 1)})
    return made


def _variant(source: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    target = source.with_name(f"{source.name}-{name}")
    shutil.copytree(source, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
