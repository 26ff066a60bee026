"""Holds of a real vLLM for CUDA under load, eager and with graphs, on one GPU and two: no token is of a mixture."""

from __future__ import annotations

import importlib.util
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chains import computed_next, make_chain, next_tokens
from children import run_child
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.timeout(420),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
CHILD = Path(__file__).parents[1] / "support" / "held_child.py"
SEEDS = (1, 2)
UPDATES = 8
MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 256 << 20}
GRAPHS = {
    "eager": {"enforce_eager": True},
    "graphs": {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8],
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("chains")
    return [make_chain(folder / str(seed), seed) for seed in SEEDS]


def versions_of(tokens: list[int], follows: list[list[int]]) -> list[int]:
    """Return which version made each token after the first; -1 for none."""
    found = []
    for before, after in pairwise(tokens):
        makers = [version for version, next_of in enumerate(follows) if next_of[before] == after]
        found.append(makers[0] if makers else -1)
    return found


def check_streams(told: dict[str, Any], vocab: int) -> int:
    """Check every token; return how many times a stream went over to other weights."""
    follows = [next_tokens(seed, vocab).tolist() for seed in SEEDS]
    switches = 0
    for tokens in told["streams"]:
        made_by = versions_of(tokens, follows)
        assert -1 not in made_by, f"token {made_by.index(-1) + 1} of {len(tokens)} is of neither version"
        crossed = sum(a != b for a, b in pairwise(made_by))
        assert crossed <= UPDATES
        switches += crossed
    assert set(versions_of(told["last"], follows)) == {UPDATES % 2}
    return switches


def test_a_mixture_would_be_seen(checkpoints: list[Path]) -> None:
    """Whichever tensor a step is first to read new, most of its tokens are of neither version."""
    old, new = (load_file(folder / "model.safetensors") for folder in checkpoints)
    vocab = len(old["lm_head.weight"])
    wanted = [next_tokens(seed, vocab) for seed in SEEDS]
    assert [computed_next(one).equal(next_of) for one, next_of in zip((old, new), wanted, strict=True)] == [True] * 2
    for name in (n for n in old if "embed" in n or "lm_head" in n or "down_proj" in n):
        found = computed_next(old | {name: new[name]})
        strange = (found != wanted[0]) & (found != wanted[1])
        assert strange.float().mean() > 0.5, name


@pytest.mark.parametrize("graphs", list(GRAPHS))
@pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
def test_every_token_is_of_one_version(
    checkpoints: list[Path], tmp_path: Path, graphs: str, tp_size: int
) -> None:
    engine = {"tensor_parallel_size": tp_size, "max_num_seqs": 8, **MEMORY, **GRAPHS[graphs]}
    spec = {"checkpoints": list(map(str, checkpoints)), "updates": UPDATES, "streams": 8, "engine": engine}
    told = run_child(CHILD, spec, tmp_path, os.environ | {"HEADRACE_STAGING_GIB": "0.5"}, timeout_s=400)
    assert {report["barrier"] for report in told["reports"]} == {"hold"}
    vocab = len(load_file(checkpoints[0] / "model.safetensors")["lm_head.weight"])
    assert check_streams(told, vocab) >= UPDATES
