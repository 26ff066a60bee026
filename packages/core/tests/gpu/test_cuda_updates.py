"""Whole updates of workers on GPUs: every route, every check, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from headrace.server.parameter_server import ParameterServer
from headrace.testing import shapes
from headrace.testing.bare_engine import BareEngine
from headrace.testing.leaks import left_over, snapshot
from headrace.testing.recipe_backend import RecipeBackend
from headrace.types import WorkerId

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(400)]

MODEL = shapes.ModelShape(
    layers=2, hidden=512, vocab=4000, heads=8, kv_heads=2, head_dim=64, intermediate=1536,
    experts=8, expert_intermediate=192,
)  # fmt: skip
WORLD = 2
UPDATES = 200


def make_worker(worker: WorkerId, world_size: int) -> RecipeBackend:
    """Make a worker; where there is one GPU, all share it."""
    torch.cuda.set_device(worker.rank % torch.cuda.device_count())
    return RecipeBackend(
        recipe(worker.rank), worker, world_size, device=f"cuda:{torch.cuda.current_device()}"
    )


def recipe(rank: int) -> object:
    return shapes.tp_recipe(shapes.params_of(MODEL), WORLD, rank, kv_heads=2)


def poison(backend: RecipeBackend, _receiver: object) -> None:
    for tensor in backend.live_tensors().values():
        tensor.view(torch.uint8).fill_(0xEE)
    torch.cuda.synchronize()


def live_bytes(backend: RecipeBackend, _receiver: object) -> dict[str, bytes]:
    return {n: t.cpu().view(torch.uint8).numpy().tobytes() for n, t in backend.live_tensors().items()}


def device_bytes(_backend: object, _receiver: object) -> tuple[int, int]:
    """Return device memory that torch holds, and what the whole device has in use."""
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated(), total - free


def random_tensors() -> dict[str, torch.Tensor]:
    return {
        m.name: torch.randint(-(2**15), 2**15, m.shape, dtype=torch.int16).view(torch.bfloat16)
        for m in shapes.params_of(MODEL)
    }


def wanted(rank: int, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    backend = RecipeBackend(recipe(rank), WorkerId("expected", rank), WORLD)  # type: ignore[arg-type]
    backend.load(tensors.items())
    return live_bytes(backend, None)


@pytest.fixture(scope="module")
def engine() -> Iterator[BareEngine]:
    with BareEngine(make_worker, WORLD) as engine:
        yield engine


@pytest.mark.parametrize("route", ["direct", "direct over tcp", "broadcast"])
@pytest.mark.parametrize("verify", ["none", "digest", "full"])
def test_all_bytes_arrive(engine: BareEngine, route: str, verify: str) -> None:
    tensors = random_tensors()
    transport = "tcp" if "tcp" in route else "auto"
    with ParameterServer(tensors=tensors) as server:
        for _ in range(3):
            for tensor in tensors.values():
                tensor.view(torch.int16).add_(1)
            engine.call_all(poison)
            server.update(engine.control, route=route.split()[0], transport=transport, verify=verify)
            for rank, found in enumerate(engine.call_all(live_bytes)):
                assert found == wanted(rank, tensors)


def test_a_ring_that_goes_round_in_the_pause(engine: BareEngine) -> None:
    tensors = random_tensors()
    with ParameterServer(tensors=tensors) as server:
        engine.call_all(poison)
        report = server.update(
            engine.control, route="direct", transport="tcp", budget_bytes=4 << 20, bucket_bytes=1 << 20
        )
        assert report.workers[0].ring.startswith("overlapped")
        for rank, found in enumerate(engine.call_all(live_bytes)):
            assert found == wanted(rank, tensors)


def test_many_updates_leave_nothing_behind(engine: BareEngine) -> None:
    tensors = random_tensors()
    with ParameterServer(tensors=tensors) as server:
        for _ in range(4):
            server.update(engine.control, route="direct")
        before, memory = snapshot(), engine.call_all(device_bytes)
        for _ in range(UPDATES):
            server.update(engine.control, route="direct")
        assert left_over(before) == []
        for (was, used), (now, using) in zip(memory, engine.call_all(device_bytes), strict=True):
            assert now <= was
            assert using <= used + (8 << 20)
