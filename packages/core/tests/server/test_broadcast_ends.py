"""A broadcast ends when engines have what it brought, whatever they do with it afterwards."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
import torch

from headrace.server import update
from headrace.server.parameter_server import ParameterServer
from headrace.testing.local_engine import LocalEngine
from headrace.testing.recipe_backend import RecipeBackend
from headrace.testing.shapes import ModelShape, params_of, tp_recipe
from headrace.types import WorkerId

SHAPE = ModelShape(layers=1, hidden=16, vocab=70, heads=2, kv_heads=1, head_dim=8, intermediate=24)
PARAMS = params_of(SHAPE)


@pytest.mark.usefixtures("socket_dir")
def test_a_proof_that_takes_long_holds_up_no_first_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was lent for the loader stays until the proof has ended; the holders' slots are free before."""
    engine = LocalEngine([RecipeBackend(tp_recipe(PARAMS, 1, 0, kv_heads=1), WorkerId("engine", 0), 1)])
    tensors = {meta.name: torch.randn(meta.shape).to(torch.bfloat16) for meta in PARAMS}
    book, proven = engine.receivers[0].recipes, threading.Event()
    go_on, prove = threading.Event(), book.prove_with

    def slow(metas_key: str, sources: Mapping[str, torch.Tensor]) -> None:
        go_on.wait(30)
        prove(metas_key, sources)
        proven.set()

    monkeypatch.setattr(book, "prove_with", slow)
    monkeypatch.setattr(update, "FINISH_S", 3.0)
    with ParameterServer(tensors=tensors) as server:
        try:
            report = server.update(engine, route="broadcast")
        finally:
            go_on.set()
        assert {worker.route for worker in report.workers} == {"broadcast"}
        assert engine.served_version(1) == report.version
        assert proven.wait(30)
        assert server.update(engine, route="broadcast").version > report.version
    engine.close()
