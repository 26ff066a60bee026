"""SGLang servers and the command line: first weights, two at once, keys, refusals, death and return."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoints import checkpoints_of
from oracle import Oracle
from prompts import PROMPT
from sglang_server import SglangServer

from headrace.config import Deadlines, EngineTarget
from headrace.errors import BackendUnavailableError, ConfigError, ConnectError, HeadraceError
from headrace.server.parameter_server import ParameterServer
from headrace_sglang import SglangControl

pytestmark = pytest.mark.timeout(300)
LIMITS = Deadlines(ready_s=5, enrol_s=20, pause_s=20, commit_s=30)
KEY = "secret"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints_of("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle({name: checkpoints[name] for name in "abc"})


@pytest.fixture(scope="module")
def shared(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    """A server that began with dummy weights, with a key, for all tests that leave it running."""
    folder = tmp_path_factory.mktemp("shared")
    with SglangServer(
        checkpoints["a"], "--load-format", "dummy", log=folder / "sglang.log", key=KEY
    ) as server:
        yield server


@pytest.fixture
def target(shared: SglangServer) -> EngineTarget:
    return EngineTarget(shared.target, {"Authorization": f"Bearer {KEY}"})


def headrace(*arguments: str) -> dict[str, Any]:
    """Run the command and return its JSON."""
    command = [sys.executable, "-m", "headrace", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def check(server: SglangServer, oracle: Oracle, name: str, version: int) -> None:
    """Ask, and compare with transformers and with the version that the server says."""
    assert server.version() == str(version)
    assert oracle.problems(PROMPT, server.generate(PROMPT, 12), [name] * 12) == []


def test_first_weights_of_two_servers(
    shared: SglangServer, checkpoints: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    """Both began with dummy weights; the command brings them to one version, with the key of both."""
    dummy = ("--load-format", "dummy")
    with SglangServer(checkpoints["a"], *dummy, log=tmp_path / "2.log", key=KEY) as other:
        arguments = ("--to", shared.target, "--to", other.target, "--header", f"Authorization: Bearer {KEY}")
        for turn, name in enumerate("bc", start=1):
            assert headrace("update", "--checkpoint", str(checkpoints[name]), *arguments)["version"] == turn
            for server in (shared, other):
                check(server, oracle, name, turn)
        dead_and_back(shared, other, checkpoints, oracle, tmp_path)


def dead_and_back(
    alive: SglangServer, dying: SglangServer, checkpoints: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    """A scheduler is killed while it stages: the update fails, the other serves on; started again it takes the next."""
    headers = {"Authorization": f"Bearer {KEY}"}
    targets = [EngineTarget(alive.target, headers), EngineTarget(dying.target, headers)]

    with ParameterServer(checkpoints["a"]) as source:
        with pytest.raises(HeadraceError) as caught:
            source.update(targets, deadlines=LIMITS, progress=killer(dying, "stage", slice(None)))
        assert caught.value.weights_state == "old"
        check(alive, oracle, "c", 2)
        dying.kill()
        with SglangServer(
            checkpoints["b"], log=tmp_path / "3.log", port=dying.port, key=KEY
        ) as again:
            report = source.update(targets)
            for server in (alive, again):
                check(server, oracle, "a", report.version)


def killer(server: SglangServer, when: str, which: slice) -> Callable[[str, int, int], None]:
    """Return a progress callback that kills some schedulers of a server at the beginning of a phase."""

    def kill(phase: str, _done: int, _total: int) -> None:
        if phase == when:
            schedulers = [
                process
                for process in psutil.Process(server.process.pid).children(recursive=True)
                if "sglang::scheduler" in " ".join(process.cmdline())
            ]
            assert schedulers
            for process in schedulers[which]:
                process.kill()
                process.wait(10)

    return kill


@pytest.mark.slow
@pytest.mark.parametrize("when", ["stage", "commit"])
def test_one_rank_of_two_dies(when: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The update ends within its deadlines; what stays alone is refused or gone at the next one."""
    with (
        SglangServer(checkpoints["a"], "--tp-size", "2", log=tmp_path / "1.log", workers=2) as server,
        ParameterServer(checkpoints["b"]) as source,
    ):
        source.update(server.target)
        with pytest.raises(HeadraceError) as caught:
            source.update(server.target, deadlines=LIMITS, progress=killer(server, when, slice(1, 2)))
        assert caught.value.weights_state in (("old",) if when == "stage" else ("old", "mixed"))
        with pytest.raises(HeadraceError):
            source.update(server.target, deadlines=LIMITS)


def test_a_key_guards_the_door(shared: SglangServer, target: EngineTarget, checkpoints: dict[str, Path]) -> None:
    with ParameterServer(checkpoints["b"]) as source:
        with pytest.raises((ConnectError, ConfigError), match="header"):
            source.update(shared.target, deadlines=LIMITS)
        assert source.update(target).version == int(shared.version())


def test_an_update_of_sglangs_own_is_not_disturbed(
    shared: SglangServer, target: EngineTarget, checkpoints: dict[str, Path], oracle: Oracle
) -> None:
    with ParameterServer(checkpoints["b"]) as source:
        version = source.update(target).version
        shared.client.post("/begin_weight_update", json={}).raise_for_status()
        with pytest.raises(BackendUnavailableError, match="end_weight_update") as caught:
            source.update(target)
        assert caught.value.weights_state == "old"
        shared.client.post("/end_weight_update", json={}).raise_for_status()
        check(shared, oracle, "b", version)
        check_after = source.update(target)
    check(shared, oracle, "b", check_after.version)


def test_names_that_nothing_uses(
    shared: SglangServer, target: EngineTarget, checkpoints: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    """SGLang's own routes pass over them in silence."""
    from safetensors.torch import load_file

    tensors = load_file(checkpoints["c"] / "model.safetensors")
    stray = "model.layers.0.self_attn.z_proj.weight"
    with ParameterServer(tensors=tensors | {stray: next(iter(tensors.values()))}) as source:
        with pytest.raises(HeadraceError, match="z_proj") as caught:
            source.update(target, strict=True)
        assert caught.value.weights_state == "old"
        report = source.update(target)
        assert stray in report.unused_names
    check(shared, oracle, "c", report.version)


def test_other_dtypes_and_shapes_are_refused_before_the_pause(
    shared: SglangServer, target: EngineTarget, checkpoints: dict[str, Path], oracle: Oracle
) -> None:
    """SGLang itself dies of such a shape."""
    import torch
    from safetensors.torch import load_file

    with ParameterServer(checkpoints["a"]) as source:
        version = source.update(target).version
    tensors = load_file(checkpoints["b"] / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for wrong in (tensors[name][:, :-1].contiguous(), tensors[name].to(torch.int32)):
        with ParameterServer(tensors=tensors | {name: wrong}) as source:
            with pytest.raises(HeadraceError, match="down_proj") as caught:
                source.update(target)
            assert caught.value.weights_state == "old"
        check(shared, oracle, "a", version)


@pytest.mark.slow
def test_a_server_without_the_plug_in_says_what_to_do(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with SglangServer(
        checkpoints["a"], log=tmp_path / "1.log", variables={"SGLANG_PLUGINS": "another"}
    ) as server:
        control = SglangControl(server.url)
        with pytest.raises(BackendUnavailableError, match="SGLANG_PLUGINS"):
            control.wait_ready(10)
        control.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "workers", "way_out"), [("--pp-size", 2, "--pp-size 1"), ("--tokenizer-worker-num", 1, "without --tok")]
)
def test_servers_that_cannot_be_updated_are_refused(
    flag: str, workers: int, way_out: str, checkpoints: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    """Pipeline-parallel schedulers ignore a pause, many fronts have no plug-ins: nothing is touched."""
    with SglangServer(checkpoints["a"], flag, "2", log=tmp_path / "1.log", workers=workers) as server:
        with ParameterServer(checkpoints["b"]) as source:
            with pytest.raises(BackendUnavailableError, match=way_out) as caught:
                source.update(server.target)
            assert caught.value.weights_state == "old"
        assert oracle.problems(PROMPT, server.generate(PROMPT, 12), ["a"] * 12) == []
