"""A real vLLM and a real SGLang server, started without weights, join what a keeper holds; transformers is the judge.

Each runs where its engine is installed: `nox -s vllm` and `nox -s sglang` make such environments.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from p2p_world import HoldProcess, run_join

ROOT = Path(__file__).parents[2]
PROMPT = [10, 11, 12, 13, 14, 15, 16, 17]
pytestmark = [pytest.mark.timeout(290), pytest.mark.slow]


def server(engine: str, model: Path, log: Path) -> Any:
    """Start an engine's server without weights; skip the test where the engine is not installed."""
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"needs {engine}: run this in the environment of `nox -s {engine}`")
    support = ROOT / "packages" / f"{engine}-adapter" / "tests" / "support"
    sys.path[:0] = [str(ROOT / "tests" / "engines" / "support"), str(support), str(support / "cpu")]
    if engine == "vllm":
        from vllm_server import VllmServer

        return VllmServer(model, "--load-format", "dummy", log=log)
    import torchvision_operators  # noqa: F401 - transformers imports torchvision where it is installed
    from sglang_server import SglangServer

    return SglangServer(model, "--load-format", "dummy", log=log)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_real_engine_joins(engine: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = make_model(tmp_path / "model")
    with (
        server(engine, model, tmp_path / "log") as started,
        HoldProcess(model, tmp_path / "metas", "--version", "5") as keeper,
    ):
        report = run_join(started.target, keeper.metas, "--transport", "tcp", timeout_s=120)
        assert report["version"] == 5
        assert set(report["join"]["from_holders"]) == set(keeper.holders)
        answer = started.generate(PROMPT, 12)
        from oracle import Oracle

        assert Oracle({"5": model}).problems(PROMPT, answer, ["5"] * 12) == []
        assert started.version() in {"5", ""}


def make_model(folder: Path) -> Path:
    """Write a small model whose heads the engines' kernels take."""
    from headrace.testing.tiny_model import TinySize, make_tiny_qwen3

    return make_tiny_qwen3(folder, 5, size=TinySize(head_dim=32))
