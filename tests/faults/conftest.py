"""A socket folder of each test's own, and worlds: bare engines with weights that are known to the byte."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# For `faults_world`, which spawned workers import too, and `fence`.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "engines" / "support"))

from faults_world import MakeWorld, World

from headrace.testing.leaks import left_over, snapshot


@pytest.fixture(autouse=True)
def own_sockets(socket_dir: Path) -> None:
    """Every test has a socket folder of its own."""


@contextmanager
def nothing_left(socket_dir: Path, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check that the body leaves no segment, mapping, process or socket folder to this process."""
    before = snapshot([])
    yield
    caplog.get_records("call").clear()  # what was logged holds exceptions, their frames, and what these hold
    assert left_over(before, [], socket_dir=socket_dir, ignoring=("files", "threads")) == []


@pytest.fixture
def make_world(
    socket_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[MakeWorld]:
    """Start worlds that a test may break; afterwards nothing of them is left."""
    made: list[World] = []

    def make(**options: object) -> World:
        made.append(World(tmp_path / f"world-{len(made)}", **options))  # type: ignore[arg-type]
        return made[-1]

    with nothing_left(socket_dir, caplog):
        yield make
        for world in made:
            world.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Start a world of two workers for a module's tests."""
    world = World(tmp_path_factory.mktemp("shared"))
    yield world
    world.close()


@pytest.fixture
def world(shared: World, socket_dir: Path, caplog: pytest.LogCaptureFixture) -> Iterator[World]:
    """Return the shared world, whole; afterwards it is whole again and nothing else of the test is left."""
    shared.begin()
    with nothing_left(socket_dir, caplog):
        yield shared
        shared.end()
