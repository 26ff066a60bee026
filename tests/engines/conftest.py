"""What all engines' tests stand on: checkpoints, what transformers says of them, a server, and a folder for sockets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "support")]

from checkpoints import checkpoints_of  # noqa: E402 - found there
from oracle import Oracle  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def socket_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set the socket folder for this process and the servers that it starts."""
    folder = tmp_path_factory.mktemp("s")
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_SOCKET_DIR", str(folder))
        yield


@pytest.fixture(scope="class")
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the checkpoints of the suite's model."""
    return checkpoints_of(request.cls.family, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="class")
def oracle(checkpoints: dict[str, Path]) -> Oracle:
    return Oracle({name: checkpoints[name] for name in "abc"})


@pytest.fixture(scope="class")
def server(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Run the suite's server, which starts with checkpoint `a`."""
    suite = request.cls
    log = tmp_path_factory.mktemp("log") / "server.log"
    with suite.engine(checkpoints["a"], *suite.options, log=log, **suite.choices) as server:
        yield server
