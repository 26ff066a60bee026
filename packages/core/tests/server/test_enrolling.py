"""Who may be updated together."""

from __future__ import annotations

import pytest
import torch

from headrace.errors import ConfigError
from headrace.server.parameter_server import ParameterServer
from headrace.testing.local_engine import LocalEngine
from headrace.testing.recipe_backend import RecipeBackend
from headrace.testing.shapes import ModelShape, params_of, tp_recipe
from headrace.types import WorkerId

PARAMS = params_of(ModelShape(layers=1, hidden=16, vocab=70, heads=2, kv_heads=1, head_dim=8, intermediate=24))


@pytest.mark.usefixtures("socket_dir")
def test_an_engine_that_is_named_twice_is_not_told_to_wait_for_itself() -> None:
    """Its addresses may differ; its workers do not."""
    engine = LocalEngine([RecipeBackend(tp_recipe(PARAMS, 1, 0, kv_heads=1), WorkerId("engine", 0), 1)])
    tensors = {meta.name: torch.zeros(meta.shape, dtype=torch.bfloat16) for meta in PARAMS}
    try:
        with ParameterServer(tensors=tensors) as server:
            with pytest.raises(ConfigError, match=r"are one engine, as worker engine\[0\] is in both") as caught:
                server.update([engine, engine])
            assert not caught.value.retryable
            assert server.update(engine).version == 1
    finally:
        engine.close()
