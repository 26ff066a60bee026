"""Families that SGLang loads in different ways: after every update, the source's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES
from oracle import Oracle
from prompts import PROMPT, RunOffline

pytestmark = pytest.mark.timeout(180)

FAST = {("llama-tied", "dummy"), ("qwen3-moe", "auto"), ("phi3", "auto"), ("gpt2", "dummy")}
CASES = [
    pytest.param(name, load_format, marks=() if (name, load_format) in FAST else pytest.mark.slow)
    for name, family in FAMILIES.items()
    for load_format in ("auto", "dummy")
    if family.sglang
]


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
    assert [result["opaque"] for result in results[2:]] == [0, 0]
