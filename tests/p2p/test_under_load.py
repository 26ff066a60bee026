"""Members that come and go while an instance serves on the same host: none of its requests fails."""

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
WINDOW_S = 4.0
READER = Path(__file__).with_name("p2p_reader.py")
pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


def test_ten_members_come_and_go_while_an_instance_serves(
    checkpoints: list[Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The instance has a core of its own, and keeper and members the others; its rate before and meanwhile is noted."""
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
            begin = time.monotonic()
            time.sleep(WINDOW_S)
            before = rate(stream, begin, time.monotonic())
            begin = time.monotonic()
            for _ in range(JOINS):
                command = [
                    *others,
                    sys.executable,
                    str(READER),
                    str(keeper.metas),
                    "tcp",
                    str(checkpoints[0]),
                    "5",
                ]
                done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
                assert json.loads(done.stdout.splitlines()[-1])["equal"]
            meanwhile = rate(stream, begin, time.monotonic())
            assert stream.error is None
        record_property("share_of_rate", meanwhile / before)
        sys.stderr.write(f"tokens per second: {before:.1f} before, {meanwhile:.1f} meanwhile\n")
        assert [member.name for member in keeper.standing().members] == ["test"]
        assert serving.differences(checkpoints[0]) == []
        assert not serving.health()["paused"]


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Keep this process, which reads the stream, off the instance's core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def rate(stream: Stream, begin: float, end: float) -> float:
    """Return tokens per second between two moments."""
    return sum(begin <= one <= end for one in stream.arrivals_s) / (end - begin)
