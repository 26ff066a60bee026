"""Draft models of speculative decoding: updated where their weights are in the source, else left and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import add_guesser
from families import FAMILIES
from oracle import Oracle
from prompts import PROMPT, RunOffline

pytestmark = pytest.mark.timeout(240)


def check_answers(results: list[dict[str, Any]], folders: dict[str, Path], order: str) -> None:
    """Answers are the target's, whatever was guessed; no update failed."""
    oracle = Oracle(folders)
    for which, result in zip(order, results, strict=True):
        assert "error" not in result
        assert oracle.problems(PROMPT, result["answer"], [which] * 12) == []


def guesses(results: list[dict[str, Any]]) -> list[list[int]]:
    return [result["answer"]["guesses"] for result in results]


@pytest.mark.parametrize("unpacked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_draft_of_the_same_checkpoint_changes_with_it(
    unpacked: bool, run_offline: RunOffline, tmp_path: Path
) -> None:
    """Its guesses are all accepted, so there are only as many as are needed: after every update too."""
    made = {name: FAMILIES["qwen3"].make(tmp_path, seed) for name, seed in (("a", 1), ("b", 2))}
    draft = {"method": "draft_model", "model": str(made["a"]), "num_speculative_tokens": 2}
    results = run_offline([made[name] for name in "aba"], unpacked=unpacked, speculative_config=draft)
    check_answers(results, made, "aba")
    at_a, at_b, again = guesses(results)
    assert len(at_a) == len(at_b)
    assert at_a == again != at_b
    assert [result["left"] for result in results[1:]] == [[], []]


def test_a_draft_of_another_checkpoint_is_left(run_offline: RunOffline, tmp_path: Path) -> None:
    made = {name: FAMILIES["qwen3"].make(tmp_path, seed) for name, seed in (("a", 1), ("b", 2), ("other", 9))}
    draft = {"method": "draft_model", "model": str(made["other"]), "num_speculative_tokens": 2}
    results = run_offline([made["a"], made["b"]], speculative_config=draft)
    check_answers(results, made, "ab")
    left = results[1]["left"]
    assert "draft/model.embed_tokens.weight" in left
    assert "draft/model.layers.1.mlp.down_proj.weight" in left
    assert all(name.startswith("draft/") for name in left)


@pytest.mark.parametrize("load_format", ["auto", pytest.param("dummy", marks=pytest.mark.slow)])
def test_layers_for_prediction_change_where_the_source_has_them(
    load_format: str, run_offline: RunOffline, tmp_path: Path
) -> None:
    """The last source has none, as trainers' have none: they stay, and the answers are right all the same."""
    made = {name: FAMILIES["deepseek-v3"].make(tmp_path, seed) for name, seed in (("a", 1), ("b", 2))}
    full = {name: add_guesser(folder, seed) for seed, (name, folder) in enumerate(made.items())}
    engine = FAMILIES["deepseek-v3"].engine
    draft = {"method": "mtp", "num_speculative_tokens": 1, **engine}
    results = run_offline(
        [full["a"], full["b"], full["a"], full["b"], made["a"]],
        unpacked=True,
        load_format=load_format,
        speculative_config=draft,
        **engine,
    )
    check_answers(results[1:], made, "baba")
    _, at_b, at_a, again, without = guesses(results)
    assert at_b == again != at_a != without
    assert [result["left"] for result in results[1:4]] == [[], [], []]
    assert "draft/model.layers.2.eh_proj.weight" in results[4]["left"]
