"""What needs the real engine is left out where there is none; nothing here stands in for it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parent / "support"
sys.path[:0] = [
    str(SUPPORT),
    str(SUPPORT / "cpu"),
    str(Path(__file__).parents[3] / "tests" / "engines" / "support"),
]

from children import run_child  # noqa: E402 - found there
from prompts import PROMPT, RunOffline  # noqa: E402 - found there
from sglang_server import environment  # noqa: E402

HAS_SGLANG = importlib.util.find_spec("sglang") is not None
collect_ignore = [] if HAS_SGLANG else ["test_families.py", "test_server.py", "test_offline.py", "test_hooks.py"]
if HAS_SGLANG:
    import torchvision_operators  # noqa: F401 - transformers imports torchvision where it is installed


@pytest.fixture(autouse=True)
def own_sockets(socket_dir: Path) -> None:
    """Every test has a socket folder of its own."""


@pytest.fixture
def run_offline(tmp_path: Path) -> RunOffline:
    """Return a function that runs `offline_child.py` and returns its results."""

    def run(
        checkpoints: list[Path],
        *,
        num_tokens: int = 12,
        verify: str = "digest",
        cache: str = "recompute",
        variables: dict[str, str] | None = None,
        **engine: object,
    ) -> list[dict[str, Any]]:
        told = {"checkpoints": [str(c) for c in checkpoints], "prompt": PROMPT, "num_tokens": num_tokens}
        told |= {"verify": verify, "cache": cache, "engine": engine}
        workers = int(engine.get("tp_size", 1)) * int(engine.get("dp_size", 1))  # type: ignore[call-overload]
        variables_of_all = environment(workers) | (variables or {})
        results: list[dict[str, Any]] = run_child(
            SUPPORT / "offline_child.py", told, tmp_path, variables_of_all
        )["results"]
        return results

    return run
