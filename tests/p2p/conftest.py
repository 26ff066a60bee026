"""A socket folder of each test's own, and checkpoints that all tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # for `p2p_world`

if (
    importlib.util.find_spec("sglang") is not None
):  # its torchvision stand-in must be there before transformers looks
    sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "sglang-adapter" / "tests" / "support"))
    sys.path.insert(
        0, str(Path(__file__).parents[2] / "packages" / "sglang-adapter" / "tests" / "support" / "cpu")
    )
    import torchvision_operators  # noqa: F401

pytest.importorskip("transformers", reason="the embedded engine needs the extra headrace[engine]")

from headrace.testing.tiny_model import TinySize, make_tiny_qwen3


@pytest.fixture(autouse=True)
def own_sockets(socket_dir: Path) -> None:
    """Every test has a socket folder of its own."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of equal shapes, about 40 MB each."""
    root = tmp_path_factory.mktemp("models")
    size = TinySize(num_layers=6, hidden=512, intermediate=1024, num_heads=8, num_kv_heads=4, head_dim=32)
    return [make_tiny_qwen3(root / f"seed-{seed}", seed, size=size) for seed in (1, 2)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long ones out where no marker was asked for."""
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: `-m 'slow or not slow'` runs it"))
