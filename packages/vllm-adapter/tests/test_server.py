"""vLLM servers and the command line: doors, first weights, two at once, death and return."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import checkpoints_of
from oracle import Oracle
from prompts import PROMPT
from vllm_server import REPORTS_VERSIONS, VllmServer

from headrace.config import Deadlines
from headrace.errors import BackendUnavailableError, HeadraceError
from headrace.server.parameter_server import ParameterServer
from headrace_vllm import VllmControl

pytestmark = pytest.mark.timeout(300)
LIMITS = Deadlines(ready_s=5, enrol_s=20, pause_s=20, commit_s=30)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints_of("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle({name: checkpoints[name] for name in "abc"})


def headrace(*arguments: str) -> dict[str, Any]:
    """Run the command and return its JSON."""
    command = [sys.executable, "-m", "headrace", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def test_first_weights_of_two_servers_through_both_doors(
    checkpoints: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    """One takes tickets by its weight-transfer engine, one by the worker extension; both began with dummy weights."""
    dummy = ("--load-format", "dummy")
    with (
        VllmServer(checkpoints["a"], *dummy, log=tmp_path / "1.log") as one,
        VllmServer(checkpoints["a"], *dummy, log=tmp_path / "2.log", extension=True) as two,
    ):
        for turn, name in enumerate("bc", start=1):
            made = headrace(
                "update", "--checkpoint", str(checkpoints[name]), "--to", one.target, "--to", two.target
            )
            assert made["version"] == turn
            for server in (one, two):
                assert server.version() == (str(turn) if REPORTS_VERSIONS else "")
                assert oracle.problems(PROMPT, server.generate(PROMPT, 12), [name] * 12) == []
        dead_and_back(one, two, checkpoints, oracle, tmp_path)


def dead_and_back(
    one: VllmServer, two: VllmServer, checkpoints: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    """One server dies: the update fails, the other serves on; started again it takes the next one."""
    one.kill()
    with ParameterServer(checkpoints["a"]) as source:
        with pytest.raises(HeadraceError) as caught:
            source.update([one.target, two.target], deadlines=LIMITS)
        assert caught.value.weights_state == "old"
        assert oracle.problems(PROMPT, two.generate(PROMPT, 12), ["c"] * 12) == []
        with VllmServer(checkpoints["b"], log=tmp_path / "3.log", port=one.port) as again:
            report = source.update([again.target, two.target])
            for server in (again, two):
                assert server.version() == (str(report.version) if REPORTS_VERSIONS else "")
                assert oracle.problems(PROMPT, server.generate(PROMPT, 12), ["a"] * 12) == []


@pytest.mark.slow
def test_what_development_mode_opens(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """vLLM's key guards answers and not the routes for updates: whoever reaches the port may replace the weights."""
    with VllmServer(checkpoints["a"], "--api-key", "secret", log=tmp_path / "1.log") as server:
        completion = {"model": "m", "prompt": PROMPT, "max_tokens": 1}
        assert server.client.post("/v1/completions", json=completion).status_code == 401
        assert server.client.get("/get_world_size").is_success
        with ParameterServer(checkpoints["b"]) as source:
            assert source.update(server.target).version == 1


@pytest.mark.slow
def test_a_server_without_development_mode_says_how_to_start_it(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with VllmServer(checkpoints["a"], log=tmp_path / "1.log", dev_mode=False) as server:
        control = VllmControl(server.url)
        with pytest.raises(BackendUnavailableError, match="VLLM_SERVER_DEV_MODE=1"):
            control.expected_receivers(10)
        control.close()


def test_a_stranger_is_no_vllm() -> None:
    """What answers is not vLLM at all: the error says so."""
    control = VllmControl("http://127.0.0.1:1")
    with pytest.raises(HeadraceError, match="cannot be reached"):
        control.expected_receivers(2)
    control.close()
