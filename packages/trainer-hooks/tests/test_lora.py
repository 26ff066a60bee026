"""LoRA adapters of peft are published as the model that they make of their base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="the session `trainers` of nox installs peft")

from headrace.errors import ConfigError  # noqa: E402
from headrace.geometry import Box  # noqa: E402
from headrace.protocols import SourceRegion  # noqa: E402
from headrace_trainers.fence import StepFence  # noqa: E402
from headrace_trainers.shards import shards_of  # noqa: E402
from headrace_trainers.source import ShardSource  # noqa: E402


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.query = nn.Linear(8, 12)
        self.key = nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        return self.head(self.key(hidden)) + self.query(hidden).mean()


def adapted(**options: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["query", "key", "embed"], modules_to_save=["head"], **options
    )
    model = peft.get_peft_model(Model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    source = ShardSource(shards_of(model), StepFence())
    found = {}
    for meta in source.metadata():
        buffer = bytearray(meta.num_bytes)
        source.read(SourceRegion(meta.name, Box.whole(meta.shape)), memoryview(buffer))
        found[meta.name] = torch.frombuffer(buffer, dtype=torch.float32).view(meta.shape)
    assert source.aliases() == {}
    return found


def test_adapters_are_merged_as_peft_merges_them() -> None:
    model = adapted()
    merged = copy.deepcopy(model).merge_and_unload()
    found, expected = published(model), dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_what_peft_has_merged_already_is_not_merged_again() -> None:
    model = adapted()
    before = published(model)
    model.merge_adapter()
    after = published(model)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


def test_an_adapter_that_cannot_be_merged_layer_by_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="DoRA"):
        shards_of(adapted(use_dora=True))
