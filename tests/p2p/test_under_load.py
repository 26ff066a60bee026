"""Members that come and go while an instance serves on the same host: how much they take from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from p2p_world import HoldProcess

from headrace.testing.engine_process import EngineProcess, Stream

JOINS = 10
APART_S = 1.5
LEAST_SHARE = 0.85
READER = Path(__file__).with_name("p2p_reader.py")
pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


def test_ten_members_come_and_go_while_an_instance_serves(
    checkpoints: list[Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The instance has a core of its own, and keeper and members the others; none of its requests fails.

    Its rate while members come and go, from the start of their processes to the end, is compared with that in between:
    so both suffer alike from other work on the machine, and from a clock that changes.
    """
    cores = sorted(os.sched_getaffinity(0))
    elsewhere = cores[1:] or cores
    others = ["taskset", "-c", ",".join(map(str, elsewhere))]
    with (
        on_cores(elsewhere),
        EngineProcess(checkpoints[0]) as serving,
        HoldProcess(checkpoints[0], tmp_path / "metas", prefix=others) as keeper,
    ):
        for pid in (serving.process.pid, *serving.worker_pids()):
            subprocess.run(
                ["taskset", "-a", "-c", "-p", str(cores[0]), str(pid)], check=True, capture_output=True
            )
        with Stream(serving.url) as stream:
            stream.wait_tokens(20)
            between, meanwhile = Windows(stream), Windows(stream)
            for _ in range(JOINS):
                with between.window():
                    time.sleep(APART_S)
                with meanwhile.window():
                    join(others, keeper, checkpoints[0])
            assert stream.error is None
        share = meanwhile.rate() / between.rate()
        record_property("share_of_rate", share)
        sys.stderr.write(f"tokens per second: {between.rate():.1f}, with members {meanwhile.rate():.1f}\n")
        assert [member.name for member in keeper.standing().members] == ["test"]
        assert serving.differences(checkpoints[0]) == []
        assert not serving.health()["paused"]
        assert len(cores) == 1 or share >= LEAST_SHARE


def join(prefix: Sequence[str], keeper: HoldProcess, checkpoint: Path) -> None:
    """Be a member that reads the version, checks it and leaves."""
    command = [*prefix, sys.executable, str(READER), str(keeper.metas), "tcp", str(checkpoint), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["equal"]


class Windows:
    """Stretches of time, and the tokens that a stream got in them."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._windows: list[tuple[float, float]] = []

    @contextmanager
    def window(self) -> Iterator[None]:
        """Count what comes during the body."""
        begin = time.monotonic()
        yield
        self._windows.append((begin, time.monotonic()))

    def rate(self) -> float:
        """Return tokens per second of all windows."""
        tokens = sum(b <= one <= e for one in self._stream.arrivals_s for b, e in self._windows)
        return tokens / sum(end - begin for begin, end in self._windows)


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Keep this process, which reads the stream, off the instance's core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
