"""Families that SGLang loads in different ways: after every update, the source's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES
from oracle import Oracle
from prompts import PROMPT, RunOffline

pytestmark = pytest.mark.timeout(180)

FAST = {("llama-tied", "dummy"), ("qwen3-moe", "auto"), ("gemma2", "auto"), ("gpt2", "dummy")}
CASES = [
    pytest.param(name, load_format, marks=() if (name, load_format) in FAST else pytest.mark.slow)
    for name, family in FAMILIES.items()
    for load_format in ("auto", "dummy")
    if family.sglang
]


COMPUTED = {"gemma2": 9}
"""Sources that the loader computes with, so that they go through it: gemma's norms have one added."""


@pytest.mark.parametrize(("name", "load_format"), CASES)
def test_every_update_answers_as_its_source(
    name: str, load_format: str, run_offline: RunOffline, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    checkpoints = [family.make(tmp_path, seed) for seed in (1, 2, 3)]
    results = run_offline([checkpoints[i] for i in (0, 1, 2, 0)], load_format=load_format)
    oracle = Oracle({str(i): folder for i, folder in enumerate(checkpoints)})
    assert [result["version"] for result in results] == [None, 1, 2, 3]
    for which, result in list(zip("0120", results, strict=True))[load_format == "dummy" :]:
        assert "error" not in result
        assert oracle.problems(PROMPT, result["answer"], [which] * 12) == []
    assert [result["opaque"] for result in results[2:]] == [COMPUTED.get(name, 0)] * 2


@pytest.mark.parametrize("load_format", ["auto", pytest.param("dummy", marks=pytest.mark.slow)])
def test_weights_that_kernels_repack(load_format: str, run_offline: RunOffline, tmp_path: Path) -> None:
    """Some layers hold packed weights alone, others a packed copy: both are made anew in every commit."""
    checkpoints = [FAMILIES["llama"].make(tmp_path, seed) for seed in (1, 2, 3)]
    results = run_offline(
        [checkpoints[i] for i in (0, 1, 2, 0)],
        variables={"HEADRACE_TEST_PACKED": "1"},
        load_format=load_format,
    )
    oracle = Oracle({str(i): folder for i, folder in enumerate(checkpoints)})
    for which, result in list(zip("0120", results, strict=True))[load_format == "dummy" :]:
        assert "error" not in result
        assert oracle.problems(PROMPT, result["answer"], [which] * 12) == []
    # Per layer q, k, v, gate and up; the head's and the row-parallel layers' weights are the loader's own.
    assert [result["opaque"] for result in results[2:]] == [10, 10]
