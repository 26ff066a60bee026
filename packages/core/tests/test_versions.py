"""Which version an update makes where engines come and go under one parameter server."""

from __future__ import annotations

import pytest
import torch

from headrace.errors import LocalProtocolError
from headrace.protocols import InferenceBackend
from headrace.server.parameter_server import ParameterServer
from headrace.server.versions import next_version
from headrace.testing.bare_engine import BareEngine, served_version
from headrace.testing.recipe_backend import RecipeBackend
from headrace.testing.shapes import ModelShape, params_of, tp_recipe
from headrace.types import WorkerId

pytestmark = pytest.mark.timeout(120)

SHAPE = ModelShape(layers=1, hidden=16, vocab=64, heads=2, kv_heads=2, head_dim=8, intermediate=32, tied=True)


def make_worker(worker: WorkerId, world_size: int) -> InferenceBackend:
    return RecipeBackend(tp_recipe(params_of(SHAPE), world_size, worker.rank, tied=True), worker, world_size)


@pytest.mark.parametrize(
    ("served", "wished", "held", "made"),
    [([None], None, 3, 4), ([7], None, 3, 8), ([None], 9, 3, 9), ([None], None, None, 1), ([2], None, -1, 3)],
)
def test_versions_grow_past_what_is_held(
    served: list[int | None], wished: int | None, held: int | None, made: int
) -> None:
    assert next_version(served, wished, held) == made


def test_a_version_that_the_holders_have_made_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="the holders have made 3; give at least 4"):
        next_version([None, 1], 3, 3)


def test_an_engine_started_anew_is_updated_by_the_same_server() -> None:
    tensors = {meta.name: torch.ones(meta.shape, dtype=torch.bfloat16) for meta in params_of(SHAPE)}
    with ParameterServer(tensors=tensors) as server, BareEngine(make_worker, 1) as stays:
        assert [server.update(stays.control).version for _ in range(2)] == [1, 2]
        with BareEngine(make_worker, 1) as fresh:
            assert server.update(fresh.control).version == 3
            assert server.update([stays.control, fresh.control]).version == 4
            assert [engine.call(0, served_version) for engine in (stays, fresh)] == [4, 4]
