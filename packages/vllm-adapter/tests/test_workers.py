"""A worker of a tensor-parallel server is killed in the midst of an update: an error that names it, and a way back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from checkpoints import checkpoints_of
from oracle import Oracle
from prompts import PROMPT
from vllm_server import REPORTS_VERSIONS, VllmServer

from headrace.config import Deadlines
from headrace.errors import HeadraceError
from headrace.server.parameter_server import ParameterServer
from headrace.types import CacheMode
from headrace_vllm import VllmControl

pytestmark = pytest.mark.timeout(400)
LIMITS = Deadlines(ready_s=10, enrol_s=30, pause_s=20, commit_s=30)
NOTICED_S = 15.0
"""What vLLM may take to see that a worker is gone; until then it would answer as if nothing had happened."""
LONGEST_S = 120.0
"""More than all waits of one update that fails; far less than vLLM's own of many minutes."""


class Deadly(VllmControl):
    """The control of a server, which loses a worker right after one call."""

    def __init__(self, url: str, after: str, kill: Callable[[], None]) -> None:
        super().__init__(url)
        self._after = after
        self._kill = kill

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        super().pause(cache, deadline_s)
        self._die("pause")

    def confirm(self, version: int, deadline_s: float) -> None:
        self._die("commit")
        super().confirm(version, deadline_s)

    def _die(self, where: str) -> None:
        if where == self._after:
            self._kill()
            limit = time.monotonic() + NOTICED_S
            while not self._health(1.0)[1] and time.monotonic() < limit:
                time.sleep(0.1)


def kill_worker(server: VllmServer) -> None:
    """SIGKILL the server's second worker."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    worker = next(child for child in children if "Worker_TP1" in child.name() + " ".join(child.cmdline()))
    worker.kill()
    worker.wait(10)


def update_with_a_death(server: VllmServer, source: ParameterServer, where: str) -> HeadraceError:
    """Update, lose a worker, and return the error."""
    control = Deadly(server.url, where, lambda: kill_worker(server))

    def at_stage(phase: str, _done: int, _total: int) -> None:
        if phase == where == "stage":
            kill_worker(server)

    begin = time.monotonic()
    with pytest.raises(HeadraceError) as caught:
        source.update(control, deadlines=LIMITS, progress=at_stage)
    assert time.monotonic() - begin < LONGEST_S
    control.close()
    return caught.value


@pytest.mark.parametrize(
    ("where", "state"),
    [
        ("stage", "old"),
        pytest.param("pause", "old", marks=pytest.mark.slow),
        pytest.param("commit", "new", marks=pytest.mark.slow),
    ],
)
def test_a_killed_worker_ends_the_update(where: str, state: str, tmp_path: Path) -> None:
    made = checkpoints_of("llama", tmp_path / "models")
    two = ("--tensor-parallel-size", "2")
    with ParameterServer(made["b"]) as source:
        with VllmServer(made["a"], *two, log=tmp_path / "1.log") as server:
            error = update_with_a_death(server, source, where)
            assert (error.weights_state, error.engines) == (state, {server.url: state})
            server.kill()
        with VllmServer(made["a"], *two, log=tmp_path / "2.log", port=server.port) as again:
            report = source.update(again.target)
            assert again.version() == (str(report.version) if REPORTS_VERSIONS else "")
            answer = again.generate(PROMPT, 12)
            assert Oracle({"b": made["b"]}).problems(PROMPT, answer, ["b"] * 12) == []
