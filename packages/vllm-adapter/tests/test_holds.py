"""Real vLLM servers whose workers are held for a commit: under load, by both doors, and with updaters that die."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from chains import make_chain, next_tokens
from checkpoints import checkpoints_of
from oracle import Oracle
from prompts import PROMPT
from safetensors.torch import load_file
from vllm_server import REPORTS_VERSIONS, VllmServer

from headrace.config import Deadlines
from headrace.errors import PlanError
from headrace.server.parameter_server import ParameterServer

pytestmark = pytest.mark.timeout(480)
LIMITS = Deadlines(ready_s=30, enrol_s=30, pause_s=30, commit_s=60)
NUM_TOKENS = 48
OPTIONS = ("--no-enable-prefix-caching",)
TP2 = ("--tensor-parallel-size", "2")
FAULTS = Path(__file__).parents[3] / "tests" / "faults" / "faults_updater.py"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints_of("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle({name: checkpoints[name] for name in "abc"})


class Askers:
    """Clients that ask without a break while a body runs; what they were answered."""

    def __init__(self, server: VllmServer, num_clients: int) -> None:
        self.answers: list[tuple[list[int], dict[str, Any]]] = []
        self.errors: list[Exception] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(num_clients)]

    def __enter__(self) -> Askers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self, client: int) -> None:
        turn = 0
        while not self._stop.is_set():
            prompt = [20 + client, *PROMPT, 30 + turn % 7]
            turn += 1
            try:
                self.answers.append((prompt, self._server.generate(prompt, NUM_TOKENS)))
            except httpx.HTTPError as error:
                self.errors.append(error)
                return


def source_of(checkpoint: Path) -> ParameterServer:
    """Return a source in this process: beside a server on two CPUs, holder processes take long to start."""
    return ParameterServer(tensors=load_file(checkpoint / "model.safetensors"))


def updates_under_load(server: VllmServer, checkpoints: dict[str, Path], oracle: Oracle, count: int) -> None:
    """Every token is what the version that it says it is of makes of the KV before it: no step more, none less."""
    names = {"default": "a"}
    with ExitStack() as stack:
        sources = {name: stack.enter_context(source_of(checkpoints[name])) for name in "abc"}
        load = stack.enter_context(Askers(server, 2))
        for turn in range(count):
            name = "bca"[turn % 3]
            report = sources[name].update(server.target, cache="keep", deadlines=LIMITS)
            names[str(report.version)] = name
            assert [(e.barrier, e.why) for e in report.engines] == [
                ("hold", "caches are kept and all bytes are near")
            ]
    assert load.errors == []
    assert load.answers
    if not REPORTS_VERSIONS:
        return
    assert any(len(set(answer["versions"])) > 1 for _, answer in load.answers), "no request crossed an update"
    problems = [
        problem
        for prompt, answer in load.answers
        for problem in oracle.problems_with_kept_caches(prompt, answer, [names[v] for v in answer["versions"]])
    ]
    assert problems == []
    assert server.version() == str(report.version)


@pytest.mark.parametrize("extension", [False, True], ids=["transfer", "extension"])
def test_held_under_load(
    checkpoints: dict[str, Path], oracle: Oracle, tmp_path: Path, extension: bool
) -> None:
    log = tmp_path / "vllm.log"
    with VllmServer(checkpoints["a"], *OPTIONS, log=log, unpacked=True, extension=extension) as server:
        updates_under_load(server, checkpoints, oracle, 6)


def test_batches_that_were_handed_out_before_a_hold_keep_their_version(tmp_path: Path) -> None:
    """A batch has one token, so that two requests are never in the same; a token tells which weights made it."""
    models = {name: make_chain(tmp_path / name, seed) for seed, name in enumerate("abc", start=1)}
    options = (*OPTIONS, "--max-num-scheduled-tokens", "1")
    names = {"default": "a"}
    with VllmServer(
        models["a"], *options, log=tmp_path / "vllm.log", unpacked=True, extension=True, batches_ahead=2
    ) as server, Askers(server, 2) as load:
        for name in "bcabca":
            with source_of(models[name]) as source:
                report = source.update(server.target, cache="keep", barrier="hold", deadlines=LIMITS)
            names[str(report.version)] = name
    vocab = len(load_file(models["a"] / "model.safetensors")["lm_head.weight"])
    follows = {name: next_tokens(seed, vocab).tolist() for seed, name in enumerate("abc", start=1)}
    made = [
        (before, token, names[version])
        for prompt, answer in load.answers
        for before, token, version in zip(
            [prompt[-1], *answer["tokens"]], answer["tokens"], answer["versions"], strict=False
        )
    ]
    assert any(len(set(answer["versions"])) > 1 for _, answer in load.answers), "no request crossed an update"
    assert [one for one in made if follows[one[2]][one[0]] != one[1]] == []


def test_held_under_load_by_two_workers(checkpoints: dict[str, Path], oracle: Oracle, tmp_path: Path) -> None:
    with VllmServer(checkpoints["a"], *OPTIONS, *TP2, log=tmp_path / "vllm.log", unpacked=True) as server:
        updates_under_load(server, checkpoints, oracle, 6)
        killed_while_held(server, checkpoints, oracle, names={server.version(): "a"})


def killed_while_held(
    server: VllmServer, checkpoints: dict[str, Path], oracle: Oracle, names: dict[str, str]
) -> None:
    """Before the vote the old weights serve on; after it, two workers end rather than serve what may be a mixture."""
    before = server.version()
    for place in ("unheld", "held"):
        kill_updater(server, checkpoints["b"], place)
        answer = server.generate(PROMPT, 12)
        assert oracle.problems(PROMPT, answer, [names[before]] * 12) == []
        assert set(answer["versions"]) == {before}
    kill_updater(server, checkpoints["b"], "half")
    ended(server)


def kill_updater(server: VllmServer, checkpoint: Path, place: str) -> None:
    command = [sys.executable, str(FAULTS), str(checkpoint), server.target, f"hold-{place}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as updater:
        assert updater.stdout is not None
        assert updater.stdout.readline() == "here\n"
        updater.kill()


def ended(server: VllmServer) -> None:
    """Wait until the server is gone or says that it has failed: it must answer nobody any more."""
    limit = time.monotonic() + 60
    while server.process.poll() is None and server.is_ready():
        assert time.monotonic() < limit, "the server is healthy after its workers ended"
        time.sleep(0.1)
    log = server._log
    assert log is not None
    assert "restart the engine" in log.read_text(errors="replace")


def test_a_single_worker_whose_updater_dies_goes_on_whole(
    checkpoints: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    with VllmServer(checkpoints["a"], *OPTIONS, log=tmp_path / "vllm.log", unpacked=True) as server:
        kill_updater(server, checkpoints["b"], "prepared")
        assert oracle.problems(PROMPT, server.generate(PROMPT, 12), ["a"] * 12) == []
        kill_updater(server, checkpoints["b"], "committed")
        answer = server.generate(PROMPT, 12)
        assert oracle.problems(PROMPT, answer, ["b"] * 12) == []
        if REPORTS_VERSIONS:
            assert set(answer["versions"]) == {server.version()} == {"1"}
        with ParameterServer(checkpoints["c"]) as source:
            assert source.update(server.target, cache="keep").version == 2


@pytest.mark.slow
def test_data_parallel_engines_are_paused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = ("--data-parallel-size", "2")
    with VllmServer(checkpoints["a"], *options, log=tmp_path / "vllm.log", unpacked=True) as server:
        with ParameterServer(checkpoints["b"]) as source:
            with pytest.raises(PlanError, match="2 workers are data-parallel engines of 1"):
                source.update(server.target, cache="keep", barrier="hold")
            report = source.update(server.target, cache="keep")
        assert report.engines[0].barrier == "pause"


def test_packed_weights_are_loaded_in_a_pause(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with VllmServer(checkpoints["a"], log=tmp_path / "vllm.log") as server:
        with ParameterServer(checkpoints["b"]) as source:
            report = source.update(server.target, cache="keep")
        assert report.engines[0].barrier == "pause"
        assert "the engine's own loader" in report.engines[0].why
