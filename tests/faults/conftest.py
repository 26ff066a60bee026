"""A socket folder of each test's own, and worlds: bare engines with weights that are known to the byte."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # for `faults_world`, which spawned workers import too

from faults_world import MakeWorld, World

from headrace.testing.leaks import snapshot


@pytest.fixture(autouse=True)
def socket_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the socket folder for this process and all that it starts."""
    folder = Path(tmp_path_factory.mktemp("s", numbered=True))
    folder.chmod(0o700)
    monkeypatch.setenv("HEADRACE_SOCKET_DIR", str(folder))
    return folder


@pytest.fixture
def make_world(socket_dir: Path, tmp_path: Path) -> Iterator[MakeWorld]:
    """Start worlds; afterwards no memory, socket folder or process of them is left."""
    before = snapshot([])
    made: list[World] = []

    def make(**options: object) -> World:
        world = World(tmp_path / f"world-{len(made)}", **options)  # type: ignore[arg-type]
        made.append(world)
        return world

    yield make
    for world in made:
        world.close()
    after = snapshot([], socket_dir=socket_dir)
    grown = [line for line in before.grown(after) if not line.startswith(("files", "threads"))]
    assert grown == []
