"""The real demo, short: its document, its proofs, and that no process outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.cli import demo as demo_command

pytest.importorskip("transformers", reason="the demo needs the extra headrace[engine]")

MARK = "HEADRACE_TEST_MARK"


@pytest.fixture
def mark() -> Iterator[str]:
    """A value that every process of one demo has in its environment."""
    value = uuid.uuid4().hex
    yield value
    for pid in _marked(value):
        os.kill(pid, signal.SIGKILL)


def _marked(value: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if f"{MARK}={value}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _start(mark: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "headrace", "demo", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _nobody_left(mark: str, deadline_s: float = 10.0) -> bool:
    end = time.monotonic() + deadline_s
    while _marked(mark) and time.monotonic() < end:
        time.sleep(0.05)
    return not _marked(mark)


def test_every_proof_holds_and_nothing_is_left(mark: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    process = _start(mark, "--json", "--updates", "4", "--requests", "3", "--trace", str(trace))
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    data = json.loads(out)
    assert err == ""
    assert {name: proof["problems"] for name, proof in data["proofs"].items()} == {
        "bit_equal": [],
        "requests_complete": [],
        "versions_in_order": [],
        "tokens_replayed": [],
    }
    assert data["ok"] is True
    updates = data["updates"]
    assert [update["version"] for update in updates] == [1, 2, 3, 4]
    assert [update["asked_route"] for update in updates] == ["direct", "broadcast"] * 2
    assert all(w["route"] == u["asked_route"] for u in updates for w in u["workers"])
    assert [update["first"] for update in updates][:2] == [True, False]
    assert [update["source"].split(",")[0] for update in updates] == [
        "checkpoint b",
        "checkpoint c",
        "trainer step 4",
        "trainer step 8",
    ]
    losses = [loss for update in updates for loss in update["losses"]]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert not any(worker["opaque_names"] for update in updates for worker in update["workers"])
    assert all(u["live_bytes"] == data["ceiling"]["bytes_each"] * 2 for u in updates)
    assert all(u["longest_gap_s"] > 0 for u in updates)
    assert data["requests"]["across_updates"] >= 1
    assert data["excerpt"]["versions"][0] < data["excerpt"]["versions"][1]
    assert all(f"`{key}`" in (demo_command.__doc__ or "") for key in data)
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"request", "stall", "copy", "broadcast"} <= names
    assert _nobody_left(mark)


def test_an_interrupted_demo_ends_its_engine(mark: str, tmp_path: Path) -> None:
    process = _start(mark, "--json", "--keep", str(tmp_path))
    end = time.monotonic() + 60
    while not (tmp_path / "c" / "model.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(_marked(mark)) > 1
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=40)
    assert process.returncode != 0
    assert out == ""
    assert _nobody_left(mark)
