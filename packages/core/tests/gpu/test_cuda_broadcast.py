"""Broadcasts to workers on GPUs, over rings in GPU memory: every byte, every ring, and members that die inside one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from headrace.config import MIB
from headrace.errors import CapacityError, HeadraceError
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer
from headrace.testing import shapes
from headrace.testing.bare_engine import BareControl, BareEngine, weights_state
from headrace.testing.engine_process import free_port
from headrace.testing.holding_crew import HoldingCrew, PartSource
from headrace.testing.recipe_backend import RecipeBackend
from headrace.types import CacheMode, ParamMeta, WorkerId

pytestmark = [pytest.mark.timeout(300)]

MODEL = shapes.ModelShape(
    layers=2, hidden=512, vocab=4000, heads=8, kv_heads=2, head_dim=64, intermediate=1536,
    experts=8, expert_intermediate=192,
)  # fmt: skip
PARAMS = shapes.params_of(MODEL)
WORLD = 2
UPDATES = 40
RINGS = [
    ("staged", 1 << 30, 4 * MIB),
    ("staged", 1 << 30, 64 * MIB),
    ("overlapped: 4 slots", 4 * MIB, MIB),
    ("overlapped: 3 slots", 3 * MIB, MIB),
    ("overlapped: 2 slots", 2 * MIB, MIB),
    ("serial", MIB + MIB // 2, MIB),
]


def tensor_of(meta: ParamMeta, version: int) -> torch.Tensor:
    """Return a version's random bits, the same in every process."""
    made = torch.Generator().manual_seed(zlib.crc32(f"{meta.name} {version}".encode()))
    return torch.randint(-(2**15), 2**15, meta.shape, dtype=torch.int16, generator=made)


def make_part(part: int, parts: int, version: Any) -> PartSource:
    """Fresh bits for each version, which the parts share."""
    return PartSource(PARAMS, part, parts, lambda meta: tensor_of(meta, version.value))


def recipe(rank: int) -> Any:
    return shapes.tp_recipe(PARAMS, WORLD, rank, kv_heads=2)


def make_worker(worker: WorkerId, world_size: int, num_gpus: int) -> RecipeBackend:
    gpu = worker.rank % num_gpus
    torch.cuda.set_device(gpu)
    return RecipeBackend(recipe(worker.rank), worker, world_size, device=f"cuda:{gpu}")


def poison(backend: RecipeBackend, _receiver: object) -> None:
    for tensor in backend.live_tensors().values():
        tensor.view(torch.uint8).fill_(0xEE)
    torch.cuda.synchronize()


def live_bytes(backend: RecipeBackend, _receiver: object) -> dict[str, bytes]:
    return {n: t.cpu().view(torch.uint8).numpy().tobytes() for n, t in backend.live_tensors().items()}


def device_bytes(_backend: object, _receiver: object) -> int:
    """Return what the whole device has in use, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def wanted(rank: int, version: int) -> dict[str, bytes]:
    backend = RecipeBackend(recipe(rank), WorkerId("expected", rank), WORLD)
    backend.load((m.name, tensor_of(m, version).view(torch.bfloat16)) for m in PARAMS)
    return live_bytes(backend, None)


class Fleet:
    """Workers on `num_gpus` GPUs, a holder per GPU with its part of the weights, and their parameter server."""

    def __init__(self, num_gpus: int) -> None:
        self.num_gpus = num_gpus
        self.version = multiprocessing.get_context("spawn").Value("q", 0)
        self.crew = HoldingCrew(make_part, num_gpus, self.version)
        self.engine = BareEngine(make_worker, WORLD, num_gpus)
        self.server = ParameterServer(source=self.crew.source, launch=self.crew)

    def update(self, control: BareControl | None = None, **choices: Any) -> UpdateReport:
        self.version.value += 1
        self.engine.call_all(poison)
        return self.server.update(control or self.engine.control, route="broadcast", **choices)

    def check(self) -> None:
        for rank, found in enumerate(self.engine.call_all(live_bytes)):
            assert found == wanted(rank, self.version.value)

    def close(self) -> None:
        self.server.close()
        self.engine.close()
        self.crew.close()


@pytest.fixture(scope="module")
def fleets() -> Iterator[dict[int, Fleet]]:
    made: dict[int, Fleet] = {}
    yield made
    for fleet in made.values():
        fleet.close()


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.gpu(1)), pytest.param(2, marks=pytest.mark.gpu(2))])
def fleet(request: pytest.FixtureRequest, fleets: dict[int, Fleet]) -> Fleet:
    if request.param not in fleets:
        fleets[request.param] = Fleet(request.param)
    return fleets[request.param]


@pytest.fixture
def two_gpus(fleets: dict[int, Fleet]) -> Fleet:
    if 2 not in fleets:
        fleets[2] = Fleet(2)
    return fleets[2]


@pytest.mark.parametrize(("mode", "budget", "bucket"), RINGS)
@pytest.mark.parametrize("verify", ["digest", "full"])
def test_every_byte_over_every_ring(fleet: Fleet, mode: str, budget: int, bucket: int, verify: str) -> None:
    for _ in range(2):
        report = fleet.update(budget_bytes=budget, bucket_bytes=bucket, verify=verify)
        fleet.check()
        for worker in report.workers:
            assert worker.route == "broadcast"
            assert worker.ring.startswith(mode.partition(":")[0])
            assert mode.partition(": ")[2] in worker.ring
            assert "slots lie in GPU memory" in worker.ring
            assert worker.transport == ("nccl" if fleet.num_gpus > 1 else "memory")


def test_updates_in_a_row_on_one_communicator(fleet: Fleet) -> None:
    for _ in range(5):
        fleet.update(budget_bytes=4 * MIB, bucket_bytes=MIB, verify="none")
        fleet.check()


def test_without_choices(fleet: Fleet) -> None:
    assert "slots lie in GPU memory" in fleet.update().workers[0].ring
    fleet.check()


def test_many_updates_leave_nothing_behind(fleet: Fleet) -> None:
    choices: dict[str, Any] = {"budget_bytes": 4 * MIB, "bucket_bytes": MIB, "verify": "none"}
    fleet.update()
    for _ in range(4):
        fleet.update(**choices)
    fleet.check()
    before = fleet.engine.call_all(device_bytes)
    for _ in range(UPDATES):
        fleet.update(**choices)
    fleet.check()
    for was, now in zip(before, fleet.engine.call_all(device_bytes), strict=True):
        assert now <= was + 8 * MIB


def test_a_ring_takes_what_it_says(fleet: Fleet) -> None:
    taken = []
    for depth in (2, 4):
        fleet.update(budget_bytes=depth * 4 * MIB, bucket_bytes=4 * MIB, verify="none")
        fleet.update(budget_bytes=depth * 4 * MIB, bucket_bytes=4 * MIB, verify="none")
        taken.append(fleet.engine.call_all(device_bytes))
    for small, large in zip(*taken, strict=True):
        assert abs(large - small - 8 * MIB) <= 4 * MIB


def test_no_room_is_an_error_before_the_pause(fleet: Fleet) -> None:
    pauses = fleet.engine.pauses
    with pytest.raises(CapacityError, match="budget_bytes"):
        fleet.update(budget_bytes=1000)
    assert fleet.engine.pauses == pauses
    fleet.update()
    fleet.check()


class DisturbedControl(BareControl):
    """Stops a holder when the ring is full and the pause has begun, so that the other one is inside NCCL without it.

    `killed`: it dies soon afterwards. Otherwise it hangs until nobody waits for it any more.
    """

    def __init__(self, engine: BareEngine, pid: int, *, killed: bool) -> None:
        super().__init__(engine)
        self._pid, self._killed = pid, killed

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        super().pause(cache, deadline_s)
        os.kill(self._pid, signal.SIGSTOP)
        if self._killed:
            threading.Timer(2.0, os.kill, (self._pid, signal.SIGKILL)).start()


@pytest.mark.gpu(2)
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "hung"])
def test_a_member_lost_inside_a_broadcast_ends_it_for_all(two_gpus: Fleet, killed: bool) -> None:
    fleet = two_gpus
    choices: dict[str, Any] = {"budget_bytes": 4 * MIB, "bucket_bytes": MIB}
    fleet.update(**choices)
    begin = time.monotonic()
    with pytest.raises(HeadraceError) as caught:
        fleet.update(DisturbedControl(fleet.engine, fleet.crew.pids[0], killed=killed), **choices)
    assert time.monotonic() - begin < 90
    assert caught.value.weights_state == "mixed"
    assert set(fleet.engine.call_all(weights_state)) == {"mixed"}
    for _ in range(2):
        fleet.update(**choices)
        fleet.check()


def join_group(_backend: object, receiver: Any, port: int) -> None:
    """Make an application's own process group among the workers."""
    rank = receiver.backend.identity().worker.rank
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)


def all_reduce(backend: RecipeBackend, _receiver: object) -> float:
    rank = backend.identity().worker.rank
    tensor = torch.full((1 << 20,), float(rank + 1), device="cuda")
    dist.all_reduce(tensor)
    return float(tensor.mean())


def leave_group(_backend: object, _receiver: object) -> None:
    dist.destroy_process_group()


@pytest.mark.gpu(2)
def test_an_applications_own_process_groups_stay_as_they_are(two_gpus: Fleet) -> None:
    fleet, store = two_gpus, dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda:0"))
    try:
        fleet.engine.call_all(join_group, free_port())
        for _ in range(3):
            assert fleet.engine.call_all(all_reduce) == [3.0, 3.0]
            fleet.update(budget_bytes=4 * MIB, bucket_bytes=MIB)
            fleet.check()
        own = torch.ones(1 << 20, device="cuda:0")
        dist.all_reduce(own)
        assert float(own.sum()) == 1 << 20
        fleet.engine.call_all(leave_group)
    finally:
        dist.destroy_process_group()
