"""Snapshots see what is held, here and in other processes, and nothing of what is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from headrace.config import HostSettings
from headrace.segments import HostSegment, Lender
from headrace.testing.leaks import children, descendants, left_over, snapshot


def test_segments_are_seen(tmp_path: Path) -> None:
    before = snapshot([], socket_dir=tmp_path)
    host = HostSettings(socket_dir=tmp_path, permitted_uids=frozenset({os.getuid()}))
    with HostSegment(8192, "headrace-test") as segment, Lender(host) as lender:
        lender.lend(segment)
        grown = before.grown(snapshot([], socket_dir=tmp_path))
        assert {line.split(" of ")[0] for line in grown} == {"memfds", "mappings", "files", "threads", "folders"}
    assert left_over(before, [], socket_dir=tmp_path) == []


def test_files_and_threads_are_seen() -> None:
    before = snapshot([])
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    with socket.socket():
        thread.start()
        assert {line.split(" of ")[0] for line in before.grown(snapshot([]))} == {"files", "threads"}
        stop.set()
        thread.join()
    assert left_over(before, []) == []


def test_children_of_children_are_seen() -> None:
    before, others = snapshot(), set(descendants())
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process.pid in children(os.getpid())
        assert len(set(descendants()) - others) == 2
        assert any(line.startswith("children") for line in before.grown(snapshot()))
        process.communicate(b"\n")
    assert set(descendants()) <= others
    assert left_over(before) == []
