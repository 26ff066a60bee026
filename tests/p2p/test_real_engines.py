"""A real vLLM and a real SGLang server, started without weights, join what a keeper holds; transformers is the judge.

Each runs where its engine is installed: `nox -s vllm` and `nox -s sglang` make such environments. From elsewhere the
test runs itself again by the Python that HEADRACE_VLLM_PYTHON or HEADRACE_SGLANG_PYTHON names.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from p2p_world import HoldProcess, run_join

ROOT = Path(__file__).parents[2]
PROMPT = [10, 11, 12, 13, 14, 15, 16, 17]
pytestmark = [pytest.mark.timeout(290), pytest.mark.slow]


def server(engine: str, model: Path, log: Path) -> Any:
    """Start an engine's server without weights."""
    support = ROOT / "packages" / f"{engine}-adapter" / "tests" / "support"
    sys.path[:0] = [str(ROOT / "tests" / "engines" / "support"), str(support), str(support / "cpu")]
    if engine == "vllm":
        from vllm_server import VllmServer

        return VllmServer(model, "--load-format", "dummy", log=log)
    import torchvision_operators  # noqa: F401 - transformers imports torchvision where it is installed
    from sglang_server import SglangServer

    return SglangServer(model, "--load-format", "dummy", log=log)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_real_engine_joins(engine: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(engine) is None:
        run_again(engine)
        return
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


def run_again(engine: str) -> None:
    """Run the test by the Python of an environment that has the engine; skip it where none is named."""
    variable = f"HEADRACE_{engine.upper()}_PYTHON"
    python = os.environ.get(variable, "")
    if not Path(python).is_file():
        pytest.skip(f"needs {engine}: a Python that has it, named by {variable}; `nox -s {engine}` makes one")
    chosen = f"{__file__}::{test_a_real_engine_joins.__name__}[{engine}]"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow", chosen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "1 passed" in done.stdout, done.stdout[-5000:]


def make_model(folder: Path) -> Path:
    """Write a small model whose heads the engines' kernels take."""
    from headrace.testing.tiny_model import TinySize, make_tiny_qwen3

    return make_tiny_qwen3(folder, 5, size=TinySize(head_dim=32))
