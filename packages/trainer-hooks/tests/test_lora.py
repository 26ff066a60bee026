"""LoRA adapters of peft are published as the model that they make of their base."""

from __future__ import annotations

import copy
from collections.abc import Callable
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

QUERY = ["query"]


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
    chosen = {"target_modules": ["query", "key", "embed"], "modules_to_save": ["head"]} | options
    return trained(peft.LoraConfig(r=3, lora_alpha=7, **chosen))


def trained(config: Any) -> Any:
    torch.manual_seed(3)
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


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"bias": "all"}, {"lora_bias": True, "target_modules": ["query"]}]
)
def test_adapters_are_merged_as_peft_merges_them(options: dict[str, Any]) -> None:
    model = adapted(**options)
    merged = copy.deepcopy(model).merge_and_unload()
    found, expected = published(model), dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "target_modules": ["query"]}])
def test_what_peft_has_merged_already_is_not_merged_again(options: dict[str, Any]) -> None:
    model = adapted(**options)
    before = published(model)
    model.merge_adapter()
    after = published(model)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


def test_an_adapter_that_cannot_be_merged_layer_by_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="DoRA"):
        shards_of(adapted(use_dora=True))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lambda: peft.LoHaConfig(r=3, target_modules=QUERY), "query has .*another kind than LoRA"),
        (lambda: peft.IA3Config(target_modules=QUERY, feedforward_modules=[]), "query has .*another kind than LoRA"),
        (lambda: peft.LoraConfig(r=3, target_modules=QUERY, trainable_token_indices={"embed": [1, 2]}),
         "embed.token_adapter has .*another kind than LoRA"),
        (lambda: peft.LoraConfig(r=3, target_modules=[], target_parameters=["key.weight"]), "key has .*ParamWrapper"),
    ],
)  # fmt: skip
def test_adapters_that_are_not_added_to_a_weight_are_refused(config: Callable[[], Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        shards_of(trained(config()))


def test_a_quantised_base_is_refused() -> None:
    model = adapted()
    layer = model.base_model.model.query.base_layer
    layer.weight = nn.Parameter(torch.zeros(12, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised"):
        shards_of(model)
