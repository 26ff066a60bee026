"""Processes that are started before it is known what they will hold."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headrace.config import Deadlines, HostSettings, host_settings
from headrace.control.hub import Hub
from headrace.errors import PeerLostError, TransferTimeoutError, UpdateFailedError
from headrace.server import startup
from headrace.server.holder_process import started
from headrace.server.holders import PROCESS_END_S, HolderPool, SourceSpec
from headrace.server.switchboard import Switchboard

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("socket_dir")]


@pytest.fixture
def host(request: pytest.FixtureRequest) -> HostSettings:
    return replace(host_settings(), **getattr(request, "param", {}))


@pytest.fixture
def pool(tmp_path: Path, host: HostSettings) -> Iterator[HolderPool]:
    save_file({"w": torch.arange(64)}, tmp_path / "model.safetensors")
    board = Switchboard(Hub(host))
    made = HolderPool(SourceSpec(checkpoint=str(tmp_path)), board, host)
    yield made
    made.stop()
    board.close()


def test_starting_them_loads_no_torch() -> None:
    script = "import sys, headrace.server.holder_process; print('torch' in sys.modules)"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == "False\n"


def test_a_pool_begins_with_them_and_starts_what_is_wanting(pool: HolderPool) -> None:
    with started(1) as (process,):
        pool.spares += [process]
        pool.ensure(2)
        assert pool.spares == []
        assert process.pid in {getattr(peer.hello, "pid", 0) for peer in pool.peers}
        assert [manifest.version for manifest in pool.publish(1, Deadlines())] == [1, 1]
        pool.stop()
        assert not Path(f"/proc/{process.pid}").exists()
        pool.ensure(1)


@pytest.mark.parametrize("host", [{"bind_host": "127.0.0.2", "advertise_host": "127.0.0.2"}], indirect=True)
def test_they_listen_where_their_owner_was_told_to(pool: HolderPool) -> None:
    """Also where a program chose it, and not the environment."""
    pool.ensure(1)
    (manifest,) = pool.publish(1, Deadlines())
    assert manifest.holder.tcp_endpoint.startswith("127.0.0.2:")


@pytest.mark.parametrize("host", [{"bind_host": "127.0.0.2", "advertise_host": "127.0.0.1"}], indirect=True)
def test_one_that_cannot_dial_says_so_in_a_line(pool: HolderPool, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PeerLostError, match="ended with code 1 before it was up"):
        pool.ensure(1)
    (line,) = capfd.readouterr().err.splitlines()
    assert "no connection to the coordinator tcp://127.0.0.1" in line


@pytest.mark.parametrize("host", [{"socket_dir": Path("/proc/none")}], indirect=True)
def test_one_that_cannot_lend_tells_its_owner_why(pool: HolderPool) -> None:
    pool.ensure(1)
    with pytest.raises(UpdateFailedError, match="socket folder /proc/none cannot be used"):
        pool.publish(1, Deadlines())


def test_those_that_nobody_needed_end_with_the_body() -> None:
    with started(2) as processes:
        pass
    assert not any(Path(f"/proc/{process.pid}").exists() for process in processes)


def test_one_whose_owner_dies_leaves_without_a_word() -> None:
    script = (
        "import os\nfrom headrace.server.holder_process import HolderProcess\n"
        "HolderProcess()\nos._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""  # which ends when nobody holds it open any more


def test_ctrl_c_in_a_terminal_is_not_for_them() -> None:
    """It goes to the whole process group; a holder must stay while its updater takes an update back."""
    with started(1) as (process,):
        assert os.getpgid(process.pid) == process.pid


def test_one_that_died_before_it_was_needed_is_an_error_and_the_next_call_starts_another(pool: HolderPool) -> None:
    with started(1) as (process,):
        os.kill(process.pid, 9)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        pool.spares += [process]
        with pytest.raises(PeerLostError, match="ended with code -9"):
            pool.ensure(1)
        pool.ensure(1)


def test_one_that_is_still_starting_is_not_waited_for(pool: HolderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "STARTUP_S", 0.0)
    with pytest.raises(TransferTimeoutError):
        pool.ensure(1)
    begin = time.monotonic()
    pool.stop()
    assert time.monotonic() - begin < PROCESS_END_S / 2
