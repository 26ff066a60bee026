"""The suite of all engines on real vLLM servers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "support")]
sys.path.insert(0, str(ROOT / "packages" / "vllm-adapter" / "tests" / "support"))

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: run `nox -s vllm`", allow_module_level=True)

from checkpoints import checkpoints_of  # noqa: E402
from engine_suite import EngineSuite  # noqa: E402
from folders import socket_dir  # noqa: E402, F401 - a fixture of this module
from oracle import Oracle  # noqa: E402
from vllm_server import VllmServer  # noqa: E402

pytestmark = pytest.mark.timeout(480)


@pytest.fixture(scope="class")
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints_of(request.cls.family, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="class")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle({name: checkpoints[name] for name in "abc"})


@pytest.fixture(scope="class")
def server(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with VllmServer(checkpoints["a"], *request.cls.options, log=log, **request.cls.choices) as server:
        yield server


class VllmSuite(EngineSuite):
    """What subclasses choose: the model, and the server's flags."""

    family: ClassVar[str] = "qwen3"
    options: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[dict[str, Any]] = {}


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
