"""Where the helpers of these tests are, for this process and those that it starts; the model and engine of all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from headrace.testing.engine_process import EngineProcess

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent / "support"))


@pytest.fixture(scope="session", autouse=True)
def socket_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set the socket folder for this process and all that it starts."""
    folder = Path(tmp_path_factory.mktemp("s", numbered=True))
    folder.chmod(0o700)
    os.environ["HEADRACE_SOCKET_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of odd sizes."""
    from trainer_world import ODD

    from headrace.testing.tiny_model import make_tiny_qwen3

    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), 7, size=ODD)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[EngineProcess]:
    """A real engine with one worker that serves that checkpoint, in float32."""
    from headrace.testing.engine_process import EngineProcess

    with EngineProcess(folder, 1, "--dtype", "float32") as made:
        yield made
