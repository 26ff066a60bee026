"""The suite of all engines on real vLLM servers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "packages" / "vllm-adapter" / "tests" / "support"))

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: run `nox -s vllm`", allow_module_level=True)

from engine_suite import EngineSuite  # noqa: E402
from oracle import Oracle  # noqa: E402
from vllm_server import VllmServer  # noqa: E402

pytestmark = pytest.mark.timeout(480)


class VllmSuite(EngineSuite):
    """The suite on vLLM."""

    engine: ClassVar[type] = VllmServer


class TestPacked(VllmSuite):
    """As installed: kernels repack, everything of theirs goes through the loader."""


@pytest.mark.slow
class TestPlain(VllmSuite):
    """Parameters keep the loader's layout, as on CUDA."""

    choices: ClassVar[dict[str, Any]] = {"unpacked": True}


@pytest.mark.slow
class TestTensorParallelExperts(VllmSuite):
    """A mixture of experts over two workers that share each layer."""

    family = "qwen3-moe"
    options = ("--tensor-parallel-size", "2", "--enable-expert-parallel")
    choices: ClassVar[dict[str, Any]] = {"unpacked": True}


@pytest.mark.slow
class TestTensorParallelPacked(VllmSuite):
    """Two workers with repacked weights."""

    options = ("--tensor-parallel-size", "2")


@pytest.mark.slow
class TestDataParallel(VllmSuite):
    """Two engines behind one address; which of them answers is not known, so that each has a cache of its own."""

    options = ("--data-parallel-size", "2")

    def test_kept_caches_answer_until_they_are_dropped(
        self, server: Any, checkpoints: dict[str, Path], oracle: Oracle
    ) -> None:
        self.update(server, checkpoints["a"])
        prompt = [60 + i % 50 for i in range(300)]

        def wrong_answers() -> int:
            """Ask often enough that both engines are asked."""
            answers = [server.generate(prompt, 8) for _ in range(8)]
            return sum(oracle.problems(prompt, answer, ["b"] * 8) != [] for answer in answers)

        assert wrong_answers() == 8
        self.update(server, checkpoints["b"], cache="keep")
        assert wrong_answers() > 0
        self.update(server, checkpoints["b"])
        assert wrong_answers() == 0
