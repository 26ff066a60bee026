"""Parts of a source in processes of their own are one source, also after one of them was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import Any

import pytest
import torch

from headrace.server.parameter_server import ParameterServer
from headrace.testing import shapes
from headrace.testing.bare_engine import BareEngine
from headrace.testing.holding_crew import HoldingCrew, PartSource
from headrace.testing.recipe_backend import RecipeBackend
from headrace.types import WorkerId

SHAPE = shapes.ModelShape(layers=2, hidden=48, vocab=256, heads=6, kv_heads=6, head_dim=8, intermediate=96)
PARAMS = shapes.params_of(SHAPE)


def make_part(part: int, parts: int, version: Any) -> PartSource:
    """Every element of every tensor is the version."""
    return PartSource(PARAMS, part, parts, lambda meta: torch.full(meta.shape, version.value, dtype=torch.bfloat16))


def make_worker(worker: WorkerId, world_size: int) -> RecipeBackend:
    recipe = shapes.tp_recipe(PARAMS, world_size, worker.rank, kv_heads=SHAPE.kv_heads)
    return RecipeBackend(recipe, worker, world_size)


def values(backend: RecipeBackend, _receiver: object) -> set[float]:
    return {float(value) for tensor in backend.live_tensors().values() for value in tensor.unique()}


@pytest.mark.timeout(180)
def test_parts_are_broadcast_and_replaced() -> None:
    version = multiprocessing.get_context("spawn").Value("q", 1)
    with (
        HoldingCrew(make_part, 2, version) as crew,
        BareEngine(make_worker, 2) as engine,
        ParameterServer(source=crew.source, launch=crew) as server,
    ):
        server.update(engine.control, route="broadcast")
        assert engine.call_all(values) == [{1.0}, {1.0}]
        os.kill(crew.pids[0], signal.SIGKILL)
        limit = time.monotonic() + 20
        while not server.holders.peers[1].lost and time.monotonic() < limit:
            time.sleep(0.05)
        version.value = 2
        server.update(engine.control, route="broadcast")
        assert engine.call_all(values) == [{2.0}, {2.0}]
