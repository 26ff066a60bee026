"""A vLLM and an SGLang server, brought to one version by one command.

The two cannot be installed together: this runs beside SGLang, and takes vLLM's Python from `HEADRACE_VLLM_PYTHON`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "packages"
SUPPORT = PACKAGES / "sglang-adapter" / "tests" / "support"
sys.path[:0] = [str(SUPPORT), str(SUPPORT / "cpu")]
VLLM_PYTHON = os.environ.get("HEADRACE_VLLM_PYTHON", "")

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs SGLang: run `nox -s sglang`", allow_module_level=True)
if not Path(VLLM_PYTHON).is_file():
    pytest.skip(
        "needs a Python with vLLM and headrace-vllm, named by HEADRACE_VLLM_PYTHON; `nox -s vllm` makes one",
        allow_module_level=True,
    )

import torchvision_operators  # noqa: E402, F401 - transformers imports torchvision where it is installed
from checkpoints import checkpoints_of  # noqa: E402
from oracle import Oracle  # noqa: E402
from prompts import PROMPT  # noqa: E402
from sglang_server import SglangServer  # noqa: E402

from headrace.errors import HeadraceError  # noqa: E402
from headrace.server.parameter_server import ParameterServer  # noqa: E402

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints_of("qwen3", tmp_path_factory.mktemp("models"))


class VllmBehindPipes:
    """A vLLM server that another Python started; ready when constructed. Use as a context."""

    def __init__(self, model: Path, log: Path) -> None:
        command = [VLLM_PYTHON, str(Path(__file__).parent / "support" / "vllm_child.py"), str(model), str(log)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.target: str = self._answer()

    def generate(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        """Return one greedy answer: `tokens`, `logprobs`, and the version of every token."""
        answer: dict[str, Any] = self._ask("generate", prompt, max_tokens)
        return answer

    def version(self) -> str:
        """Return vLLM's own weight version."""
        return str(self._ask("version"))

    def _ask(self, *call: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(call)}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "vLLM's side has ended"
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def fleet(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """One server of each engine."""
    folder = tmp_path_factory.mktemp("log")
    with (
        SglangServer(checkpoints["a"], log=folder / "sglang.log") as one,
        VllmBehindPipes(checkpoints["a"], folder / "vllm.log") as other,
    ):
        yield [one, other]


def test_one_command_brings_both_to_one_version(
    fleet: list[Any], checkpoints: dict[str, Path]
) -> None:
    oracle = Oracle({name: checkpoints[name] for name in "abc"})
    targets = [part for server in fleet for part in ("--to", server.target)]
    for turn, name in enumerate("bcb", start=1):
        command = [sys.executable, "-m", "headrace", "update", "--checkpoint", str(checkpoints[name]), *targets]
        done = subprocess.run(
            [*command, "--json"], capture_output=True, text=True, timeout=120, check=False, env=os.environ
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["version"] == turn
        for server in fleet:
            answer = server.generate(PROMPT, 12)
            assert set(answer["versions"]) == {server.version()} == {str(turn)}
            assert oracle.problems(PROMPT, answer, [name] * 12) == []


def test_what_does_not_fit_one_reaches_neither(fleet: list[Any], checkpoints: dict[str, Path]) -> None:
    oracle = Oracle({name: checkpoints[name] for name in "abc"})
    with ParameterServer(checkpoints["a"]) as source:
        version = source.update([server.target for server in fleet]).version
    with ParameterServer(checkpoints["misshapen"]) as source:
        with pytest.raises(HeadraceError) as caught:
            source.update([server.target for server in fleet])
        assert caught.value.weights_state == "old"
    for server in fleet:
        assert server.version() == str(version)
        assert oracle.problems(PROMPT, server.generate(PROMPT, 12), ["a"] * 12) == []
