"""The bare engine keeps the contract of engine controls, and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from headrace.errors import ConnectError, HeadraceError
from headrace.protocols import EngineControl
from headrace.testing import shapes
from headrace.testing.bare_engine import BareEngine, served_version
from headrace.testing.control_suite import EngineControlTests
from headrace.testing.leaks import children, descendants, left_over, snapshot
from headrace.testing.recipe_backend import RecipeBackend
from headrace.types import WorkerId

SMALL = shapes.ModelShape(layers=1, hidden=16, vocab=64, heads=4, kv_heads=2, head_dim=4, intermediate=16)


def make_worker(worker: WorkerId, world_size: int) -> RecipeBackend:
    return RecipeBackend(shapes.tp_recipe(shapes.params_of(SMALL), world_size, worker.rank), worker, world_size)


def raise_foreign(backend: object, receiver: object) -> None:
    raise ZeroDivisionError("nothing to divide by")


@pytest.fixture(scope="module")
def engine() -> Iterator[BareEngine]:
    with BareEngine(make_worker, 2) as engine:
        yield engine


class TestBareControl(EngineControlTests):
    num_workers = 2

    @pytest.fixture(autouse=True)
    def _engine(self, engine: BareEngine) -> None:
        self.engine = engine

    def make_control(self) -> EngineControl:
        return self.engine.control

    def is_paused(self) -> bool:
        return self.engine.paused


class TestHoldingBareControl(TestBareControl):
    def make_control(self) -> EngineControl:
        return self.engine.holding


def test_functions_run_in_workers(engine: BareEngine) -> None:
    assert engine.call_all(served_version) == [None, None]
    with pytest.raises(HeadraceError, match="ZeroDivisionError"):
        engine.call(0, raise_foreign)


def test_a_dead_worker_is_an_error_and_nothing_is_left() -> None:
    before = snapshot()
    with BareEngine(make_worker, 2) as engine:
        assert set(engine.pids) <= set(children(os.getpid()))
        engine.kill(0)
        with pytest.raises(HeadraceError, match="worker 0"):
            engine.call(0, served_version)
        assert engine.call(1, served_version) is None
    assert not set(engine.pids) & set(descendants())
    assert left_over(before, ignoring=("mappings", "files", "threads")) == []
    with pytest.raises((ConnectError, HeadraceError)):
        engine.call(1, served_version)
