"""The embedded engine under load: updaters, workers and engines that die, are late, or are told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("transformers", reason="the embedded engine needs the extra headrace[engine]")

from fence import KEY, Fence

from headrace.config import EngineTarget
from headrace.errors import HeadraceError
from headrace.registry import engine_control
from headrace.server.parameter_server import ParameterServer
from headrace.testing.engine_process import EngineProcess, Stream, free_port
from headrace.testing.leaks import children
from headrace.testing.tiny_model import make_tiny_qwen3

UPDATER = Path(__file__).with_name("faults_updater.py")
TP = 2
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of equal shapes."""
    root = tmp_path_factory.mktemp("models")
    return [make_tiny_qwen3(root / f"seed-{seed}", seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def shared_engine(checkpoints: list[Path]) -> Iterator[EngineProcess]:
    """An engine for all tests of the module that leave it running."""
    with EngineProcess(checkpoints[0], TP) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: EngineProcess, checkpoints: list[Path]) -> Iterator[EngineProcess]:
    """The shared engine with the first weights; afterwards a good update succeeds and no step saw a mixture."""
    with ParameterServer(checkpoints[0]) as server:
        server.update(shared_engine.target)
    yield shared_engine
    with ParameterServer(checkpoints[1]) as server:
        version = server.update(shared_engine.target).version
    health = shared_engine.health()
    assert (health["paused"], health["mixed_steps"]) == (False, 0)
    assert shared_engine.differences(checkpoints[1]) == []
    assert shared_engine.status()["weight_version"] == version
    assert recoveries() == []


def recoveries() -> list[int]:
    """Return the guardians on this machine that watch for this test's updaters."""
    own = os.environ["HEADRACE_SOCKET_DIR"].encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_guardian = b"headrace.recovery" in (entry / "cmdline").read_bytes()
            if is_guardian and own in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@contextmanager
def updater(checkpoint: Path, target: str, place: str, *access: str) -> Iterator[subprocess.Popen[str]]:
    """Run an updater until it has reached a place."""
    command = [sys.executable, str(UPDATER), str(checkpoint), target, place, *access]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "here\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def headrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "headrace", *arguments], capture_output=True, text=True, timeout=90, check=False
    )


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 40.0) -> None:
    limit = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < limit, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.1)


def is_running(engine: EngineProcess) -> bool:
    return engine.health()["paused"] is False


@pytest.mark.parametrize(
    ("place", "is_paused", "held"), [("staging", False, 0), ("paused", True, 0), ("committed", True, 1)]
)
def test_a_killed_updater_leaves_whole_weights_and_a_running_engine(
    engine: EngineProcess, checkpoints: list[Path], place: str, is_paused: bool, held: int
) -> None:
    """Old ones where the commit had not begun, new ones where all ranks had them; requests go on."""
    before = engine.status()["weight_version"]
    with Stream(engine.url) as stream:
        stream.wait_tokens(3)
        with updater(checkpoints[1], engine.target, place) as process:
            assert engine.health()["paused"] is is_paused
            process.kill()
        wait_until(lambda: is_running(engine), "the guardian resumes")
        wait_until(lambda: recoveries() == [], "the guardian leaves")
        stream.wait_tokens(3)
        assert stream.error is None
    assert engine.differences(checkpoints[held]) == []
    assert engine.status()["weight_version"] == before + held


def test_an_updater_killed_between_two_ranks_leaves_the_engine_paused(
    engine: EngineProcess, checkpoints: list[Path]
) -> None:
    """Nobody is answered by a mixture: not by the guardian, not by `headrace resume`, only by the next update."""
    with Stream(engine.url) as stream:
        stream.wait_tokens(3)
        with updater(checkpoints[1], engine.target, "half") as process:
            process.kill()
        wait_until(lambda: recoveries() == [], "the guardian gives up")
        assert engine.health()["paused"] is True
        refused = headrace("resume", "--to", engine.target, "--deadline-s", "20")
        assert refused.returncode != 0
        assert "different weights" in refused.stdout + refused.stderr
        assert engine.health()["paused"] is True
        with ParameterServer(checkpoints[1]) as server:
            server.update(engine.target)
        stream.wait_tokens(3)


def test_resume_by_hand(engine: EngineProcess, checkpoints: list[Path]) -> None:
    """Where the guardian died with its updater."""
    with updater(checkpoints[1], engine.target, "paused") as process:
        for guardian in recoveries():
            os.kill(guardian, signal.SIGKILL)
        process.kill()
    time.sleep(0.5)
    assert engine.health()["paused"] is True
    done = headrace("resume", "--to", engine.target)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stdout
    assert is_running(engine)
    assert engine.differences(checkpoints[0]) == []


@pytest.fixture
def hung() -> Iterator[str]:
    """The address of an engine that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"torch=http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def paused(engine: EngineProcess) -> EngineProcess:
    """The engine, as an updater leaves it that dies in the pause."""
    control = engine_control(EngineTarget(engine.target))
    control.pause("recompute", 20)
    control.close()
    return engine


def test_resume_reaches_every_engine_it_can(paused: EngineProcess, hung: str) -> None:
    done = headrace("resume", "--to", hung, "--to", paused.target, "--deadline-s", "10")
    assert done.returncode == 1
    assert hung.removeprefix("torch=") in done.stderr
    assert "resumed" in done.stdout
    assert is_running(paused)


def test_resume_can_be_broken_off_at_once() -> None:
    """An engine that does not answer has a minute to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"torch=http://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "headrace", "resume", "--to", address]
        with subprocess.Popen(command) as process, listener.accept()[0]:
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 130


def test_the_guardian_lets_no_engine_wait_for_another(paused: EngineProcess, hung: str) -> None:
    with subprocess.Popen([sys.executable, "-m", "headrace.recovery"], stdin=subprocess.PIPE, text=True) as guardian:
        assert guardian.stdin is not None
        for address in (hung, paused.target):
            guardian.stdin.write(json.dumps({"paused": asdict(EngineTarget(address))}) + "\n")
        guardian.stdin.close()
        wait_until(lambda: is_running(paused), "the guardian resumes")
        guardian.kill()


@pytest.fixture
def fence(engine: EngineProcess, tmp_path: Path) -> Iterator[Fence]:
    """A proxy before the engine that asks for a key and a certificate."""
    with Fence(engine.url, tmp_path) as fence:
        yield fence


def test_commands_pass_a_fence_with_its_key_and_certificates(
    engine: EngineProcess, fence: Fence, checkpoints: list[Path], tmp_path: Path
) -> None:
    """And without them they say at once what is wanting; the engine is not touched."""
    key = tmp_path / "key"
    key.write_text(f"Authorization: {KEY}\n")
    update = ("update", "--checkpoint", str(checkpoints[1]), "--to", f"torch={fence.url}")
    access = ("--ca", str(fence.ca), "--cert", str(fence.certificate))
    for refused, why in ((update, "CERTIFICATE_VERIFY_FAILED"), ((*update, *access), "401")):
        done = headrace(*refused)
        assert done.returncode == 1
        assert why in done.stdout + done.stderr
    assert engine.differences(checkpoints[0]) == []
    done = headrace(*update, *access, "--header", f"@{key}")
    assert done.returncode == 0, done.stderr
    assert engine.differences(checkpoints[1]) == []


def test_the_guardian_passes_the_fence_too(engine: EngineProcess, fence: Fence, checkpoints: list[Path]) -> None:
    access = (KEY, str(fence.ca), str(fence.certificate))
    with updater(checkpoints[1], f"torch={fence.url}", "paused", *access) as process:
        process.kill()
    wait_until(lambda: is_running(engine), "the guardian resumes")
    wait_until(lambda: recoveries() == [], "the guardian leaves")
    assert engine.differences(checkpoints[0]) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_updater_told_to_stop_in_the_pause(
    engine: EngineProcess, checkpoints: list[Path], number: signal.Signals
) -> None:
    with updater(checkpoints[1], engine.target, "paused") as process:
        process.send_signal(number)
        process.wait(30)
        wait_until(lambda: is_running(engine), "the engine runs")
    wait_until(lambda: recoveries() == [], "the guardian leaves")
    assert engine.differences(checkpoints[0]) == []


@pytest.mark.parametrize("arguments", [[], ["--route", "broadcast"], ["--transport", "tcp", "--verify", "full"]])
def test_the_command_updates_a_serving_engine(
    engine: EngineProcess, checkpoints: list[Path], arguments: list[str]
) -> None:
    """Requests go on; no token says that it is of an older version than one before it."""
    before = engine.status()["weight_version"]
    with Stream(engine.url) as stream:
        stream.wait_tokens(3)
        done = headrace("update", "--checkpoint", str(checkpoints[1]), "--to", engine.target, "--json", *arguments)
        assert done.returncode == 0, done.stderr
        stream.wait_tokens(3)
        assert stream.error is None
    versions = [version for version in stream.versions if version is not None]
    assert versions == sorted(versions)
    assert {before, before + 1} <= set(versions)
    assert json.loads(done.stdout)["version"] == before + 1
    assert engine.differences(checkpoints[1]) == []


def test_torchrun_ranks_hold_a_part_each(
    engine: EngineProcess, checkpoints: list[Path]
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "headrace"]
    command += ["update", "--checkpoint", str(checkpoints[1]), "--to", engine.target, "--json"]
    quiet, others = os.environ | {"OMP_NUM_THREADS": "1"}, children(os.getpid())
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=quiet)
    assert done.returncode == 0, done.stderr
    assert engine.differences(checkpoints[1]) == []
    assert set(children(os.getpid())) <= {engine.process.pid, *others}


def test_a_failing_command_says_why_in_a_line(engine: EngineProcess, checkpoints: list[Path]) -> None:
    wrong = f"torch=http://127.0.0.1:{free_port()}"
    done = headrace("update", "--checkpoint", str(checkpoints[1]), "--to", wrong, "--ready-s", "1")
    assert done.returncode != 0
    assert wrong.removeprefix("torch=") in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    stale = headrace("update", "--checkpoint", str(checkpoints[1]), "--to", engine.target, "--version", "0")
    assert stale.returncode != 0
    assert "does not grow" in stale.stderr + stale.stdout
    assert engine.differences(checkpoints[0]) == []


def test_an_engine_that_is_not_up_yet_is_waited_for(checkpoints: list[Path]) -> None:
    with EngineProcess(checkpoints[0], TP, wait=False) as late, ParameterServer(checkpoints[1]) as server:
        assert server.update(late.target).version == 1
        assert late.differences(checkpoints[1]) == []


def test_a_dead_worker_is_reported_and_a_new_engine_enrols(
    checkpoints: list[Path]
) -> None:
    """Requests fail in time, the update says which worker, and the same server updates the engine's successor."""
    with ParameterServer(checkpoints[1]) as server:
        with EngineProcess(checkpoints[0], TP) as engine, Stream(engine.url) as stream:
            stream.wait_tokens(3)
            server.update(engine.target)
            os.kill(engine.worker_pids()[1], signal.SIGSTOP)
            with ThreadPoolExecutor(1) as pool:
                update = pool.submit(fails, server, engine.target)
                time.sleep(1.0)
                os.kill(worker_of(engine), signal.SIGKILL)
                error = update.result(60)
            assert str(error)
            wait_until(lambda: stream.error is not None, "the stream ends")
            wait_until(lambda: engine.health()["status"] == "failed", "the engine says that it is dead")
            assert "SIGKILL" in engine.health()["reason"]
        with EngineProcess(checkpoints[0], TP, port=engine.port) as successor:
            report = server.update(successor.target)
            assert successor.differences(checkpoints[1]) == []
            assert successor.status()["weight_version"] == report.version


def worker_of(engine: EngineProcess) -> int:
    """Return the worker that hangs."""
    for pid in children(engine.process.pid):
        if " T " in Path(f"/proc/{pid}/stat").read_text():
            return pid
    message = "no worker hangs"
    raise AssertionError(message)


def fails(server: ParameterServer, target: str) -> Any:
    with pytest.raises((HeadraceError, httpx.HTTPError)) as caught:
        server.update(target)
    return caught.value
