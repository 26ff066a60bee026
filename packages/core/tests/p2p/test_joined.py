"""A host that stays after it has joined keeps nothing of the holders that it read from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from headrace.config import Deadlines, host_settings
from headrace.control.hub import Hub
from headrace.server import joining
from headrace.server.holders import HolderPool, SourceSpec
from headrace.server.joining import Ways, joined
from headrace.server.keeping import Keeper
from headrace.server.switchboard import Switchboard
from headrace.store.tensors import TensorSource
from headrace.testing.local_engine import LocalEngine
from headrace.testing.recipe_backend import RecipeBackend
from headrace.testing.shapes import ModelShape, params_of, tp_recipe
from headrace.types import WorkerId

SHAPE = ModelShape(layers=1, hidden=16, vocab=70, heads=2, kv_heads=1, head_dim=8, intermediate=24)
PARAMS = params_of(SHAPE)


@pytest.fixture
def keeper(socket_dir: object) -> Iterator[Keeper]:
    host = host_settings()
    board = Switchboard(Hub(host))
    source = TensorSource({meta.name: torch.randn(meta.shape).to(torch.bfloat16) for meta in PARAMS})
    pool = HolderPool(SourceSpec(source=source), board, host)
    made = Keeper(pool, host, [])
    try:
        pool.ensure(1)
        made.offer(pool.publish(1, Deadlines()))
        yield made
    finally:
        made.close()
        pool.stop()
        board.close()


def test_who_stays_maps_nothing_of_the_keepers_memory(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `join --keep-held` does: what a keeper replaces on this host would stay in its memory for as long."""
    made: list[Ways] = []

    class Recorded(Ways):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(joining, "Ways", Recorded)
    engine = LocalEngine([RecipeBackend(tp_recipe(PARAMS, 1, 0, kv_heads=1), WorkerId("engine", 0), 1)])
    try:
        with joined(keeper.exchange.invitation, [engine], host_settings()) as (report, _server):
            assert set(report.transports.values()) == {"memory"}
            assert [ways._made for ways in made] == [{}]
    finally:
        engine.close()
