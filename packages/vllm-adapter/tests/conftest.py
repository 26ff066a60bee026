"""What needs the real engine is left out where there is none; nothing here stands in for it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parent / "support"
sys.path[:0] = [str(SUPPORT), str(Path(__file__).parents[3] / "tests" / "engines" / "support")]

from children import run_child  # noqa: E402 - found there
from prompts import PROMPT, RunOffline  # noqa: E402
from vllm_variables import QUIET  # noqa: E402

HAS_VLLM = importlib.util.find_spec("vllm") is not None
NEED_VLLM = [f"test_{name}.py" for name in ("drafts", "families", "holds", "offline", "server", "workers")]
collect_ignore = [] if HAS_VLLM else NEED_VLLM


@pytest.fixture(autouse=True)
def own_sockets(socket_dir: Path) -> None:
    """Every test has a socket folder of its own."""


@pytest.fixture
def run_offline(tmp_path: Path) -> RunOffline:
    """Return a function that runs `offline_child.py` and returns its results."""

    def run(
        checkpoints: list[Path],
        *,
        unpacked: bool = False,
        num_tokens: int = 12,
        lora: Path | None = None,
        **engine: object,
    ) -> list[dict[str, Any]]:
        told = {"checkpoints": [str(c) for c in checkpoints], "prompt": PROMPT, "num_tokens": num_tokens}
        told |= {"unpacked": unpacked, "engine": engine, "lora": lora and str(lora)}
        results: list[dict[str, Any]] = run_child(
            SUPPORT / "offline_child.py", told, tmp_path, os.environ | QUIET
        )["results"]
        return results

    return run
