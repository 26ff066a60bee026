"""Tiny checkpoints and engines, made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.importorskip("transformers", reason="the embedded engine needs the extra headrace[engine]")

from headrace.embedded.engine import EmbeddedEngine
from headrace.embedded.settings import EngineSettings
from headrace.testing.tiny_model import TINY_MODELS

StartEngine = Callable[..., EmbeddedEngine]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per kind; `other` has the shapes of `qwen3` and other weights."""
    root = tmp_path_factory.mktemp("tiny")
    made = {kind: make(root / kind, seed=11) for kind, make in TINY_MODELS.items()}
    made["other"] = TINY_MODELS["qwen3"](root / "other", seed=12, shards=2)
    made["tied"] = TINY_MODELS["qwen3"](root / "tied", seed=13, tie=True)
    return made


@pytest.fixture
def start_engine() -> Iterator[StartEngine]:
    """Start engines that are ready, and stop them after the test."""
    yield from _starter()


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[StartEngine]:
    """Return engines that tests share; a test leaves them as it found them."""
    starter = _starter()
    yield cache(next(starter))
    next(starter, None)


def _starter() -> Iterator[StartEngine]:
    engines: list[EmbeddedEngine] = []

    def start(model: Path, **options: object) -> EmbeddedEngine:
        engine = EmbeddedEngine(EngineSettings(model=model, start_s=60.0, step_s=20.0, **options))  # type: ignore[arg-type]
        engines.append(engine)
        engine.start()
        engine.wait_ready(60.0)
        return engine

    yield start
    for engine in engines:
        engine.stop()
