"""One suite for all engines with a server: what an update under load must keep. Subclass it per engine.

A subclass names its `engine` (what it makes has `target`, `generate(prompt, max_tokens)`, `version()`), the model and
the server's flags. Fixtures are in `conftest.py`: `server`; `checkpoints` by name (`a` is what the server was started
with, `b`, `c`, `partial`, `misshapen`); `oracle`, whose versions are names of checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from headrace.config import Deadlines
from headrace.errors import HeadraceError
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer

PROMPT = [10, 11, 12, 13, 14, 15, 16, 17]
NUM_TOKENS = 48
LIMITS = Deadlines(ready_s=30, enrol_s=30, describe_s=60, stage_s=60, pause_s=30, commit_s=60, read_s=60)


class Load:
    """Clients that ask without a break, and every answer they got."""

    def __init__(self, server: Any, num_clients: int, num_tokens: int) -> None:
        self.answers: list[tuple[list[int], dict[str, Any]]] = []
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(server, client, num_tokens), daemon=True)
            for client in range(num_clients)
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ask while the body runs; ends when every request in flight has its answer."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(120)

    def _run(self, server: Any, client: int, num_tokens: int) -> None:
        turn = 0
        while not self._stop.is_set():
            prompt = [20 + client, *PROMPT, 30 + turn % 7]
            turn += 1
            try:
                self.answers.append((prompt, server.generate(prompt, num_tokens)))
            except Exception as error:  # noqa: BLE001 - told by the test
                self.errors.append(error)
                return


class EngineSuite:
    """Tests that every engine with a server inherits.

    Attributes:
        engine: Class of the server, called with the model's folder, the options, `log` and the choices.
        family: The model, as `families` names it.
        options: Flags of the server.
        choices: Further arguments of `engine`.
    """

    engine: ClassVar[type]
    family: ClassVar[str] = "qwen3"
    options: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[dict[str, Any]] = {}

    def update(self, server: Any, checkpoint: Path, **choices: Any) -> UpdateReport:
        with ParameterServer(checkpoint) as source:
            return source.update(server.target, deadlines=LIMITS, **choices)

    def check(self, server: Any, oracle: Any, name: str) -> None:
        """Ask anew and compare with transformers on the checkpoint `name`; the version must be the server's own."""
        answer = server.generate(PROMPT, 12)
        assert set(answer["versions"]) == {server.version()}
        assert oracle.problems(PROMPT, answer, [name] * 12) == []

    def test_versions_follow_success(self, server: Any, checkpoints: dict[str, Path], oracle: Any) -> None:
        before = server.generate(PROMPT, 12)
        assert oracle.problems(PROMPT, before, ["a"] * 12) == []
        report = self.update(server, checkpoints["b"])
        assert server.version() == str(report.version)
        self.check(server, oracle, "b")
        assert self.update(server, checkpoints["a"]).version == report.version + 1
        self.check(server, oracle, "a")

    @pytest.mark.parametrize("broken", ["partial", "misshapen"])
    def test_a_source_that_does_not_fit_never_reaches_the_engine(
        self, server: Any, checkpoints: dict[str, Path], oracle: Any, broken: str
    ) -> None:
        self.update(server, checkpoints["b"])
        version = server.version()
        with pytest.raises(HeadraceError) as caught:
            self.update(server, checkpoints[broken])
        assert caught.value.weights_state == "old"
        assert server.version() == version
        self.check(server, oracle, "b")
        self.update(server, checkpoints["c"])
        self.check(server, oracle, "c")

    def test_ten_updates_under_load(self, server: Any, checkpoints: dict[str, Path], oracle: Any) -> None:
        names = {server.version(): self.name_now(server, checkpoints, oracle)}
        load = Load(server, 2, NUM_TOKENS)
        with load.running():
            for turn in range(10):
                name = "abc"[turn % 3]
                names[str(self.update(server, checkpoints[name]).version)] = name
        assert load.errors == []
        spans = [set(answer["versions"]) for _, answer in load.answers]
        assert any(len(versions) > 1 for versions in spans), "no request was in flight over an update"
        for _, answer in load.answers:
            assert len(answer["tokens"]) == NUM_TOKENS
            versions = list(map(_number, answer["versions"]))
            assert versions == sorted(versions)
        said = [(prompt, answer, [names[v] for v in answer["versions"]]) for prompt, answer in load.answers]
        assert oracle.problems_of(said) == []

    def test_verified_byte_by_byte(self, server: Any, checkpoints: dict[str, Path], oracle: Any) -> None:
        assert self.update(server, checkpoints["b"], verify="full").verify == "full"
        self.check(server, oracle, "b")

    def test_by_tcp(self, server: Any, checkpoints: dict[str, Path], oracle: Any) -> None:
        report = self.update(server, checkpoints["c"], transport="tcp")
        assert {worker.transport for worker in report.workers} == {"tcp"}
        self.check(server, oracle, "c")

    def test_no_old_cache_answers(self, server: Any, checkpoints: dict[str, Path], oracle: Any) -> None:
        """A prompt long enough for the prefix cache, asked before and after."""
        self.update(server, checkpoints["a"])
        prompt = [10 + i % 50 for i in range(300)]
        assert oracle.problems(prompt, server.generate(prompt, 8), ["a"] * 8) == []
        self.update(server, checkpoints["b"])
        assert oracle.problems(prompt, server.generate(prompt, 8), ["b"] * 8) == []

    def test_kept_caches_answer_until_they_are_dropped(
        self, server: Any, checkpoints: dict[str, Path], oracle: Any
    ) -> None:
        self.update(server, checkpoints["a"])
        prompt = [60 + i % 50 for i in range(300)]
        server.generate(prompt, 8)
        self.update(server, checkpoints["b"], cache="keep")
        assert oracle.problems(prompt, server.generate(prompt, 8), ["b"] * 8) != []
        self.update(server, checkpoints["b"])
        assert oracle.problems(prompt, server.generate(prompt, 8), ["b"] * 8) == []

    def test_a_killed_holder_then_a_good_update(
        self, server: Any, checkpoints: dict[str, Path], oracle: Any
    ) -> None:
        self.update(server, checkpoints["a"])
        with ParameterServer(checkpoints["b"]) as source:
            source.update(server.target, deadlines=LIMITS)
            version = server.version()
            with pytest.raises(HeadraceError) as caught:
                source.update(server.target, deadlines=LIMITS, progress=self.kill_holders_at_stage)
            assert caught.value.weights_state == "old"
            assert server.version() == version
            self.check(server, oracle, "b")
            source.update(server.target, deadlines=LIMITS)
        self.check(server, oracle, "b")

    def kill_holders_at_stage(self, phase: str, _done: int, _total: int) -> None:
        """SIGKILL the holder processes of this process when staging begins."""
        import psutil

        if phase != "stage":
            return

        found = [
            p for p in psutil.Process().children(recursive=True) if "headrace.holder" in " ".join(p.cmdline())
        ]
        for process in found:
            process.kill()
            process.wait(10)

    def name_now(self, server: Any, checkpoints: dict[str, Path], oracle: Any) -> str:
        """Return which checkpoint the server answers by."""
        answer = server.generate(PROMPT, 12)
        return next(name for name in "abc" if not oracle.problems(PROMPT, answer, [name] * 12))


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else 0
