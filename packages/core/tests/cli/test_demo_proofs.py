"""The demo's proofs fail where they must: every kind of wrong that they claim to rule out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs the extra headrace[engine]")

from safetensors.torch import load_file

from headrace.cli.demo_tables import excerpt
from headrace.demo.proofs import (
    Proof,
    Window,
    replay_proof,
    requests_proof,
    versions_proof,
    weight_differences,
)
from headrace.demo.story import schedule
from headrace.demo.streams import Prompt, StreamedRequest, gaps
from headrace.testing.tiny_model import make_tiny_qwen3

HEALTH = {"status": "ready", "paused": False, "mixed_steps": 0}
WINDOW = Window(version=1, begin_s=2.5, end_s=2.75)


def request(versions: list[int | None], **changes: Any) -> StreamedRequest:
    """A finished request with a token per second, from second 1 on."""
    count = len(versions)
    fields: dict[str, Any] = {
        "stream": 0,
        "prompt": Prompt("the", [5]),
        "num_wanted": count,
        "tokens": list(range(count)),
        "texts": [f" {i}" for i in range(count)],
        "versions": versions,
        "times_s": [1.0 + i for i in range(count)],
        "finish_reason": "length",
        "done": True,
    }
    return StreamedRequest(**(fields | changes))


def test_a_complete_request_is_complete() -> None:
    proof = requests_proof([request([0, 0, 1])])
    assert (proof.ok, proof.details["tokens"]) == (True, 3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"error": "ReadError"}, "ReadError"),
        ({"done": False}, "did not end"),
        ({"num_wanted": 4}, "3 tokens came, 4"),
        ({"finish_reason": "stop"}, "'stop'"),
    ],
)
def test_a_lost_token_or_a_failure_is_told(changes: dict[str, Any], text: str) -> None:
    proof = requests_proof([request([0, 0, 1]), request([0, 0, 1], **changes)])
    assert len(proof.problems) == 1
    assert text in proof.problems[0]
    assert proof.problems[0].startswith("request 1")


def test_no_requests_prove_nothing() -> None:
    assert not requests_proof([]).ok


def test_versions_in_order_hold() -> None:
    assert versions_proof([request([0, 0, 1, 1])], [WINDOW], HEALTH).ok


@pytest.mark.parametrize(
    ("versions", "health", "text"),
    [
        ([0, None, 1, 1], HEALTH, "1 tokens of unknown version"),
        ([1, 0, 1, 1], HEALTH, "versions fall"),
        ([0, 0, 0, 0], HEALTH, "ran across the update to version 1, but shows 0 to 0"),
        ([1, 1, 1, 1], HEALTH, "ran across the update to version 1, but shows 1 to 1"),
        ([0, 0, 1, 1], HEALTH | {"mixed_steps": 2}, "2 steps with mixed weights"),
        ([0, 0, 1, 1], HEALTH | {"paused": True}, "paused True"),
    ],
)
def test_wrong_versions_are_told(versions: list[int | None], health: dict[str, Any], text: str) -> None:
    proof = versions_proof([request(versions)], [WINDOW], health)
    assert any(text in problem for problem in proof.problems)


def test_gaps_are_between_tokens_of_one_request_only() -> None:
    found = list(gaps([request([0, 0, 0]), request([0], times_s=[99.0])]))
    assert [gap.length_s for gap in found] == [1.0, 1.0]
    assert [gap.overlaps(2.5, 2.6) for gap in found] == [False, True]


def test_the_schedule_takes_turns() -> None:
    steps = schedule(6)
    assert [step.checkpoint for step in steps] == ["b", "c", "b", "", "", ""]
    assert [step.route for step in steps] == ["direct", "broadcast"] * 3
    assert [step.checkpoint for step in schedule(1)] == ["b"]


def test_the_excerpt_shows_both_sides_of_an_update() -> None:
    found = excerpt([request([0] * 20), request([0, 0, 1])])
    assert found == {"versions": [0, 1], "before": "the 0 1", "after": " 2 ..."}
    assert excerpt([request([0, 0])]) is None


def _fingerprint(name: str, whole: torch.Tensor, rows: list[tuple[int, int]]) -> dict[str, Any]:
    held = torch.cat([whole[begin:end] for begin, end in rows])
    return {
        "name": name,
        "dtype": "float32",
        "boxes": [{"offsets": [b, 0], "shape": [e - b, whole.shape[1]]} for b, e in rows],
        "dim": 0,
        "sha256": hashlib.sha256(held.numpy().tobytes()).hexdigest(),
    }


def _answer(source: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Two workers: `w` in two fused groups, each split by rows; `r` whole on both."""
    return {
        "ranks": [
            {
                "rank": rank,
                "tensors": [
                    _fingerprint("w", source["w"], [(2 * rank, 2 * rank + 2), (4 + 2 * rank, 6 + 2 * rank)]),
                    _fingerprint("r", source["r"], [(0, 3)]),
                ],
            }
            for rank in range(2)
        ]
    }


def test_one_bit_is_a_difference() -> None:
    generator = torch.Generator().manual_seed(3)
    source = {
        "w": torch.randn(8, 5, generator=generator),
        "r": torch.randn(3, 2, generator=generator),
    }
    answer = _answer(source)
    assert weight_differences(answer, source) == []
    flipped = {name: tensor.clone() for name, tensor in source.items()}
    flipped["w"].view(torch.int32)[7, 4] ^= 1
    assert weight_differences(answer, flipped) == ["rank 1: w"]


def test_missing_shards_and_names_are_differences() -> None:
    source = {"w": torch.ones(8, 5), "r": torch.ones(3, 2)}
    answer = _answer(source)
    answer["ranks"].pop()
    assert weight_differences(answer, source) == ["w: the workers hold 20 of 40 elements between them"]
    assert "rank 0: r" in weight_differences(answer, {"w": source["w"]})
    assert weight_differences(answer, source | {"x": torch.ones(1)})[-1].startswith("x: the workers hold 0")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """Two versions of a tiny model."""
    root = tmp_path_factory.mktemp("replay")
    folders = [make_tiny_qwen3(root / str(seed), seed) for seed in range(2)]
    return folders[0], {i: load_file(folder / "model.safetensors") for i, folder in enumerate(folders)}


def _greedy(folder: Path, weights: dict[int, dict[str, torch.Tensor]], versions: list[int]) -> list[int]:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    tokens = [40, 41]
    for version in versions:
        model.load_state_dict(weights[version])
        with torch.inference_mode():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[2:]


def test_replay_tells_tokens_of_other_weights(
    models: tuple[Path, dict[int, dict[str, torch.Tensor]]],
) -> None:
    folder, weights = models
    made: list[int] = [0, 0, 0, 1, 1, 1]
    tokens = _greedy(folder, weights, made)

    def replay(versions: list[int | None], said: list[int]) -> Proof:
        one = request(versions, tokens=said, prompt=Prompt("", [40, 41]))
        return replay_proof([one], weights, folder)

    assert replay([*made], tokens).ok
    assert not replay([0, 0, 0, 0, 1, 1], tokens).ok
    assert not replay([*made], [*tokens[:2], *tokens[3:], 7]).ok
    assert not replay([], []).ok
