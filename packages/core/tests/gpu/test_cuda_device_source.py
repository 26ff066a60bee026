"""A trainer's shards on GPUs are read where they are, and arrive byte by byte."""

from __future__ import annotations

import pytest
import torch

from headrace.errors import ConfigError
from headrace.geometry import Box
from headrace.server.parameter_server import ParameterServer
from headrace.store.device import DeviceSource, Shard
from headrace.testing import shapes
from headrace.testing.bare_engine import BareEngine
from headrace.testing.recipe_backend import RecipeBackend
from headrace.types import ParamMeta, WorkerId

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(200)]

MODEL = shapes.ModelShape(
    layers=2, hidden=512, vocab=4000, heads=8, kv_heads=2, head_dim=64, intermediate=1536,
    experts=8, expert_intermediate=192,
)  # fmt: skip
WORLD = 2


def make_worker(worker: WorkerId, world_size: int) -> RecipeBackend:
    torch.cuda.set_device(worker.rank % torch.cuda.device_count())
    recipe = shapes.tp_recipe(shapes.params_of(MODEL), world_size, worker.rank, kv_heads=2)
    return RecipeBackend(recipe, worker, world_size, device=f"cuda:{torch.cuda.current_device()}")


def live_bytes(backend: RecipeBackend, _receiver: object) -> dict[str, bytes]:
    return {n: t.cpu().view(torch.uint8).numpy().tobytes() for n, t in backend.live_tensors().items()}


def row_shards() -> list[Shard]:
    """Return every parameter's rows over as many shards as there are workers, round the GPUs."""
    shards = []
    for meta in shapes.params_of(MODEL):
        each = -(-meta.shape[0] // WORLD)
        for part in range(WORLD):
            rows = min((part + 1) * each, meta.shape[0]) - part * each
            box = Box((part * each, *(0,) * (len(meta.shape) - 1)), (rows, *meta.shape[1:]))
            device = f"cuda:{part % torch.cuda.device_count()}"
            shards.append(Shard(meta, box, torch.empty(box.shape, dtype=torch.bfloat16, device=device)))
    return shards


@pytest.mark.parametrize("verify", ["none", "digest", "full"])
def test_shards_are_read_in_place(verify: str) -> None:
    source = DeviceSource(row_shards())
    with BareEngine(make_worker, WORLD) as engine, ParameterServer(source=source) as server:
        for _ in range(3):
            for shard in source.shards:
                shard.tensor.view(torch.int16).random_(-(2**15), 2**15)
            report = server.update(engine.control, route="direct", verify=verify)
            assert report.workers[0].ring.startswith("none")
            whole: dict[str, torch.Tensor] = {}
            for shard in source.shards:
                parts = [whole[shard.meta.name]] if shard.meta.name in whole else []
                whole[shard.meta.name] = torch.cat([*parts, shard.tensor.cpu()])
            for rank, found in enumerate(engine.call_all(live_bytes)):
                recipe = shapes.tp_recipe(shapes.params_of(MODEL), WORLD, rank, kv_heads=2)
                expected = RecipeBackend(recipe, WorkerId("expected", rank), WORLD)
                expected.load(whole.items())
                assert found == live_bytes(expected, None)


def test_what_cannot_be_lent_is_refused() -> None:
    meta, box = ParamMeta("w", "bfloat16", (4, 4)), Box.whole((4, 4))
    made = torch.zeros(4, 4, dtype=torch.bfloat16, device="cuda")
    for tensor, problem in (
        (made.cpu(), "not on a GPU"),
        (made.t(), "contiguous"),
        (made[:2], "contiguous"),
        (made.float(), "float32"),
    ):
        with pytest.raises(ConfigError, match=problem):
            DeviceSource([Shard(meta, box, tensor)])
