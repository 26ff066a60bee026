"""What one run of an updater leaves in a worker is gone before the next run's holders need the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headrace.server.parameter_server import ParameterServer
from headrace.testing.leaks import snapshot
from headrace.testing.local_engine import LocalEngine
from headrace.testing.recipe_backend import RecipeBackend
from headrace.testing.shapes import ModelShape, params_of, tp_recipe
from headrace.types import WorkerId

SHAPE = ModelShape(layers=1, hidden=16, vocab=70, heads=2, kv_heads=1, head_dim=8, intermediate=24)
PARAMS = params_of(SHAPE)


@pytest.mark.usefixtures("socket_dir")
def test_a_worker_gives_dead_holders_memory_back_before_others_read(tmp_path: Path) -> None:
    """Holders are processes of their own here, and the worker is this one."""
    save_file({m.name: torch.randn(m.shape).to(torch.bfloat16) for m in PARAMS}, tmp_path / "model.safetensors")
    engine = LocalEngine([RecipeBackend(tp_recipe(PARAMS, 1, 0, kv_heads=1), WorkerId("engine", 0), 1)])
    mapped_bytes = []

    def told(phase: str, _done: int, total: int) -> None:
        if phase == "read" and not total:
            mapped_bytes.append(sum(snapshot([]).mappings.values()))

    try:
        for _ in range(3):
            with ParameterServer(checkpoint=str(tmp_path)) as server:
                report = server.update(engine, progress=told)
            assert {worker.route for worker in report.workers} == {"direct"}
            assert sum(snapshot([]).mappings.values()) > 0
    finally:
        engine.close()
    assert mapped_bytes == [0, 0, 0]
