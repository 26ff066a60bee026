"""TorchBackend on the second rank of two: shards, their boxes, and recipes that need no loader.

One process without a network; always the same rank, since torch caches offsets by mesh and not by rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import WeightConverter
from transformers.core_model_loading import Chunk
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

from headrace.embedded import naming
from headrace.embedded.backend import TorchBackend
from headrace.embedded.messages import Fingerprint
from headrace.errors import ApplyError
from headrace.recording import record
from headrace.types import ParamMeta, ParamTable, WorkerId

Whole = dict[str, torch.Tensor]


@contextmanager
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be rank 1 of a group whose collectives do nothing; loading needs none."""
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def load_backend(folder: Path) -> TorchBackend:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", distributed_config=DistributedConfig(tp_size=2)
    ).requires_grad_(False)
    return TorchBackend(model, WorkerId("test", 1), world_size=2)


def whole_tensors(folder: Path) -> Whole:
    found: Whole = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return found


def fused(checkpoint: Whole, num_experts: int = 4) -> Whole:
    """Stack experts as the model does, written down independently of the loader."""
    model = {name: t for name, t in checkpoint.items() if ".experts." not in name}
    for layer in {name.split(".experts.")[0] for name in checkpoint if ".experts." in name}:
        parts = [
            [checkpoint[f"{layer}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")]
            for e in range(num_experts)
        ]
        model[f"{layer}.experts.gate_up_proj"] = torch.stack([torch.cat([g, u]) for g, u, _ in parts])
        model[f"{layer}.experts.down_proj"] = torch.stack([d for _, _, d in parts])
    return model


def sha256_of_boxes(whole: torch.Tensor, print_: Fingerprint) -> str:
    boxes = []
    for box in print_.boxes:
        index = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))
        boxes.append(whole[index])
    shard = torch.cat(boxes, dim=print_.dim) if len(boxes) > 1 else boxes[0]
    return hashlib.sha256(shard.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_moe", "tied"])
def test_shards_are_slices_of_the_checkpoint(
    checkpoints: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = whole_tensors(checkpoints[kind])
    model = fused(checkpoint)
    with second_of_two(monkeypatch):
        backend = load_backend(checkpoints[kind])
        at_start = backend.fingerprints()
        for tensor in backend.live_tensors().values():
            tensor.zero_()
        backend.load(checkpoint.items())
        after = backend.fingerprints()
    assert {p.name for p in at_start} == set(model)
    assert [p.sha256 for p in at_start] == [sha256_of_boxes(model[p.name], p) for p in at_start]
    assert at_start == after
    sharded = [p for p in at_start if p.local_shape != p.shape]
    assert len(sharded) > len(at_start) / 3


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "tied"])
def test_recipes_are_copies_only(
    checkpoints: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = ParamTable(
        ParamMeta(name, str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in whole_tensors(checkpoints[kind]).items()
    )
    with second_of_two(monkeypatch):
        backend = load_backend(checkpoints[kind])
        recipe = record(
            backend.skeleton(),
            sources,
            live=backend.live_tensors(),
            reload_unit=backend.reload_unit,
            optional=backend.optional,
            derived=backend.derived(),
            can_rederive=backend.rederive([]),
        )
    assert recipe.opaque_reasons == {}
    assert not len(recipe.opaque)
    assert not len(recipe.unused)
    assert int(recipe.regions.num_elements.sum()) == sum(t.numel() for t in backend.live_tensors().values())


def test_groups_without_a_fixed_place_go_through_transformers(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that joins what the model keeps apart: refused in part, converted when whole."""

    def conversions(model: object) -> list[WeightConverter]:
        parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
        return [WeightConverter("mlp.gate_up_proj.weight", parts, [Chunk(dim=0)])]

    checkpoint = whole_tensors(checkpoints["other"])
    joined = {n: t for n, t in checkpoint.items() if "gate_proj" not in n and "up_proj" not in n}
    for layer in (0, 1):
        mlp = f"model.layers.{layer}.mlp"
        parts = [checkpoint[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up")]
        joined[f"{mlp}.gate_up_proj.weight"] = torch.cat(parts)
    with second_of_two(monkeypatch):
        wanted = load_backend(checkpoints["other"]).fingerprints()
        monkeypatch.setattr(naming, "get_model_conversion_mapping", conversions)
        backend = load_backend(checkpoints["qwen3"])
        backend.load(joined.items())
        assert backend.fingerprints() == wanted
        with pytest.raises(ApplyError, match="gate_proj"):
            backend.load([("model.layers.0.mlp.gate_up_proj.weight", torch.zeros(100, 64))])
