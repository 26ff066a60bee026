"""Families that vLLM loads in different ways, on packed and plain kernels: after every update, the source's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from oracle import Oracle
from prompts import PROMPT, RunOffline

pytestmark = pytest.mark.timeout(180)

FAST = {
    ("qwen3", "packed", "auto"),
    ("qwen3-moe", "packed", "auto"),
    ("deepseek-v3", "plain", "dummy"),
    ("gpt-oss", "plain", "auto"),
}
CASES = [
    pytest.param(
        name, kernels, load_format, marks=() if (name, kernels, load_format) in FAST else pytest.mark.slow
    )
    for name, family in FAMILIES.items()
    for kernels, load_format in (
        ("packed", "auto"),
        ("packed", "dummy"),
        ("plain", "auto"),
        ("plain", "dummy"),
    )
    if family.packed or kernels == "plain"
]


@pytest.mark.parametrize(("name", "kernels", "load_format"), CASES)
def test_every_update_answers_as_its_source(
    name: str, kernels: str, load_format: str, run_offline: RunOffline, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    checkpoints = [family.make(tmp_path, seed) for seed in (1, 2, 3)]
    results = run_offline(
        [checkpoints[i] for i in (0, 1, 2, 0)],
        unpacked=kernels == "plain",
        load_format=load_format,
        **family.engine,
    )
    oracle = Oracle({str(i): folder for i, folder in enumerate(checkpoints)})
    assert [result["version"] for result in results] == [None, 1, 2, 3]
    for which, result in list(zip("0120", results, strict=True))[load_format == "dummy" :]:
        assert "error" not in result
        assert oracle.problems(PROMPT, result["answer"], [which] * 12) == []
    assert_copies(results, plain=kernels == "plain" and not family.rewritten)


def assert_copies(results: list[dict[str, Any]], *, plain: bool) -> None:
    """From the second update on, plain kernels get all their bytes by the recipe, rewritten ones by the loader."""
    assert all((result["opaque"] == 0) == plain for result in results[2:])
