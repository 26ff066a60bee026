"""The suite of all engines on real SGLang servers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "packages" / "sglang-adapter" / "tests" / "support"
sys.path[:0] = [str(SUPPORT), str(SUPPORT / "cpu")]

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs SGLang: run `nox -s sglang`", allow_module_level=True)

import torchvision_operators  # noqa: E402, F401 - transformers imports torchvision where it is installed
from engine_suite import PROMPT, EngineSuite  # noqa: E402
from oracle import Oracle  # noqa: E402
from sglang_server import SglangServer  # noqa: E402

from headrace.errors import TransferTimeoutError  # noqa: E402
from headrace.protocols import EngineControl  # noqa: E402
from headrace.registry import engine_control  # noqa: E402
from headrace.testing.control_suite import EngineControlTests  # noqa: E402

pytestmark = pytest.mark.timeout(240)
SLOW_GRAMMAR = "|".join(f"({i}[a-z]{{{i}}})+" for i in range(2000))
"""Takes many seconds to compile."""


class SglangSuite(EngineSuite):
    """The suite on SGLang, and updaters that are killed."""

    engine: ClassVar[type] = SglangServer

    @pytest.mark.parametrize(("place", "holds"), [("paused", "a"), ("committed", "b")])
    def test_an_updater_that_is_killed_leaves_whole_weights(
        self, server: SglangServer, checkpoints: dict[str, Path], oracle: Oracle, place: str, holds: str
    ) -> None:
        """The guardian resumes: old weights where the commit had not begun, new ones where all ranks had them."""
        version = self.update(server, checkpoints["a"]).version
        with killed_updater(checkpoints["b"], server.target, place):
            assert not server.client.get("/ready").is_success
        wait_until(lambda: server.client.get("/ready").is_success)
        self.check(server, oracle, holds)
        assert server.version() == str(version + (holds == "b"))


@contextmanager
def killed_updater(checkpoint: Path, target: str, place: str) -> Iterator[None]:
    """Run an updater up to a place, and kill it after the body."""
    command = [sys.executable, str(ROOT / "tests" / "faults" / "faults_updater.py"), str(checkpoint), target, place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            yield
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], deadline_s: float = 40.0) -> None:
    limit = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


class SglangControlSuite(EngineControlTests):
    """The control's contract, on the same server."""

    server: SglangServer

    @pytest.fixture(autouse=True)
    def keep_server(self, server: SglangServer) -> None:
        self.server = server

    def make_control(self) -> EngineControl:
        return engine_control(self.server.target)

    def make_unreachable(self) -> EngineControl:
        return engine_control("sglang=http://127.0.0.1:9")

    def is_paused(self) -> bool:
        return not self.server.client.get("/ready").is_success


class PauseSuite(SglangControlSuite):
    """A pause that every replica must answer."""

    def test_a_pause_while_a_grammar_compiles(self, control: EngineControl) -> None:
        """SGLang drops no KV while it does; tried again between steps, the pause comes when it has."""
        with asking(self.server, regex=SLOW_GRAMMAR) as asked:
            with pytest.raises(TransferTimeoutError, match=r"1 of \d schedulers refused.*--cache keep") as caught:
                pause_while(control, asked)
            assert caught.value.retryable
            assert not asked.done()
            control.pause("recompute", 120)
            control.resume(30)
            assert len(asked.result(60)["tokens"]) == 4

    def test_a_pause_waits_for_every_scheduler(self, control: EngineControl) -> None:
        """Also where caches are kept and no flush makes it wait."""
        with standing(self.server):
            with pytest.raises(TransferTimeoutError):
                control.pause("keep", 1.0)
            control.resume(30)
        control.pause("keep", 60)


@contextmanager
def asking(server: SglangServer, **sampling: Any) -> Iterator[Future[dict[str, Any]]]:
    """Ask for four tokens in a thread, over the body."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(server.generate, PROMPT, 4, **sampling)


def pause_while(control: EngineControl, asked: Future[Any]) -> None:
    """Pause and resume for as long as there is no answer."""
    while not asked.done():
        control.pause("recompute", 4.0)
        control.resume(30)


@contextmanager
def standing(server: SglangServer) -> Iterator[None]:
    """Stop the last scheduler of a server, as a step that takes long does."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    scheduler = max(
        (child for child in children if "sglang::scheduler" in " ".join(child.cmdline())), key=lambda c: c.cmdline()
    )
    scheduler.suspend()
    try:
        yield
    finally:
        scheduler.resume()


class TestOneScheduler(SglangSuite, PauseSuite):
    """As installed."""


@pytest.mark.slow
class TestWithoutOverlap(SglangSuite):
    """Steps one after another."""

    family = "llama"
    options = ("--disable-overlap-schedule",)


@pytest.mark.slow
class TestTensorParallel(SglangSuite, SglangControlSuite):
    """Two schedulers that share each layer."""

    num_workers = 2
    options = ("--tp-size", "2")
    choices: ClassVar[dict[str, Any]] = {"workers": 2}

    def test_an_updater_that_is_killed_between_two_ranks_leaves_the_engine_paused(
        self, server: SglangServer, checkpoints: dict[str, Path], oracle: Oracle
    ) -> None:
        """Nobody is answered by a mixture; the next good update heals it."""
        self.update(server, checkpoints["a"])
        with killed_updater(checkpoints["b"], server.target, "half"):
            assert not server.client.get("/ready").is_success
        command = [sys.executable, "-m", "headrace", "resume", "--to", server.target, "--deadline-s", "20"]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert refused.returncode != 0
        assert "different weights" in refused.stdout + refused.stderr
        assert not server.client.get("/ready").is_success
        self.update(server, checkpoints["b"])
        self.check(server, oracle, "b")


@pytest.mark.slow
class TestDataParallel(SglangSuite, PauseSuite):
    """Two engines behind one address."""

    num_workers = 2
    options = ("--dp-size", "2")
    choices: ClassVar[dict[str, Any]] = {"workers": 2}

    @pytest.fixture
    def one_replica(self, server: SglangServer) -> Iterator[None]:
        """Have one engine answer: each has a prefix cache of its own."""
        server.replica = 1
        yield
        server.replica = None

    @pytest.mark.usefixtures("one_replica")
    def test_kept_caches_answer_until_they_are_dropped(
        self, server: SglangServer, checkpoints: dict[str, Path], oracle: Oracle
    ) -> None:
        super().test_kept_caches_answer_until_they_are_dropped(server, checkpoints, oracle)

    @pytest.mark.usefixtures("one_replica")
    def test_no_old_cache_answers(
        self, server: SglangServer, checkpoints: dict[str, Path], oracle: Oracle
    ) -> None:
        super().test_no_old_cache_answers(server, checkpoints, oracle)

    @pytest.mark.usefixtures("one_replica")
    def test_a_pause_while_a_grammar_compiles(self, control: EngineControl) -> None:
        super().test_a_pause_while_a_grammar_compiles(control)
