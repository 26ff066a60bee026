"""Ranks never publish different steps as one version: two ranks at different steps, all real, in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from headrace.config import UpdateSettings, host_settings
from headrace.errors import UpdateFailedError
from headrace.geometry import Box
from headrace.holder import Holder, HolderTicket
from headrace.protocols import SourceRegion
from headrace.server.parameter_server import ParameterServer
from headrace.testing import shapes
from headrace.testing.bare_engine import BareEngine
from headrace.testing.recipe_backend import RecipeBackend
from headrace.types import WorkerId
from headrace_trainers.fence import StepFence
from headrace_trainers.shards.tensors import flat_pieces, meta_of
from headrace_trainers.source import Piece, Shards, ShardSource

SHAPE = shapes.ModelShape(layers=1, hidden=12, vocab=128, heads=2, kv_heads=2, head_dim=6, intermediate=20)
PARAMS = shapes.params_of(SHAPE)


def make_backend(worker: WorkerId, world_size: int) -> RecipeBackend:
    recipe = shapes.tp_recipe(PARAMS, world_size, worker.rank, kv_heads=SHAPE.kv_heads)
    return RecipeBackend(recipe, worker, world_size)


def live_values(backend: RecipeBackend, _receiver: object) -> list[float]:
    """Return the distinct values of all live tensors."""
    found: set[float] = set()
    for tensor in backend.live_tensors().values():
        found |= set(tensor.unique().tolist())
    return sorted(found)


class Rank:
    """Half of every parameter; all elements are the number of the step."""

    def __init__(self, rank: int) -> None:
        self.fence = StepFence()
        self.values: list[torch.Tensor] = []
        self.regions: list[SourceRegion] = []
        metas, pieces = [], []
        for meta in PARAMS:
            half = -(-meta.num_elements // 2)
            first, last = rank * half, min((rank + 1) * half, meta.num_elements)
            value = torch.zeros(last - first, dtype=getattr(torch, meta.dtype))
            self.values.append(value)
            metas.append(meta)
            pieces += flat_pieces(meta.name, meta.shape, first, last, lambda value=value: value)
        self.source = ShardSource(Shards(tuple(metas), tuple(pieces)), self.fence)

    def step(self) -> None:
        self.fence.begin_write(30)
        for value in self.values:
            value.add_(1)
            time.sleep(1e-4)
        self.fence.end_write()


class ThreadCrew:
    """Two ranks in one process: the second one's holder is a thread."""

    world_size = 2

    def __init__(self, source: ShardSource) -> None:
        self._source = source

    def hand_out(self, tickets: Sequence[HolderTicket]) -> None:
        for ticket in tickets:
            holder = Holder(self._source, ticket, host_settings(), owns_source=False)
            threading.Thread(target=holder.run, daemon=True).start()


@pytest.fixture(scope="module")
def engine() -> Iterator[BareEngine]:
    with BareEngine(make_backend, 2) as made:
        yield made


class World:
    def __init__(self, engine: BareEngine) -> None:
        self.engine = engine
        self.ranks = [Rank(0), Rank(1)]
        self.server = ParameterServer(source=self.ranks[0].source, launch=ThreadCrew(self.ranks[1].source))

    def update(self, **choices: Any) -> int:
        report = self.server.update(self.engine.control, UpdateSettings(verify="full", **choices))
        assert report.step is not None
        assert self.engine.call_all(live_values) == [[float(report.step)]] * 2
        return report.step


@pytest.fixture
def world(engine: BareEngine) -> Iterator[World]:
    made = World(engine)
    yield made
    for rank in made.ranks:
        rank.fence.end()
    made.server.close()


def test_ranks_at_the_same_step_give_it(world: World) -> None:
    for expected in (0, 1, 2):
        assert world.update() == expected
        for rank in world.ranks:
            rank.step()


@pytest.mark.parametrize("choices", [{"transport": "tcp"}, {"route": "broadcast"}], ids=str)
def test_ranks_on_other_hosts_are_read_over_the_network(world: World, choices: dict[str, Any]) -> None:
    for expected in (0, 1, 2):
        assert world.update(**choices) == expected
        for rank in world.ranks:
            rank.step()


def test_a_rank_that_is_ahead_makes_the_others_catch_up(world: World) -> None:
    for _ in range(3):
        world.ranks[1].step()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(world.update()))
    thread.start()
    limit = time.monotonic() + 30
    while thread.is_alive() and time.monotonic() < limit:
        # The one that is behind comes along; the other one waits for it, as trainers do.
        if world.ranks[0].fence.step < 4:
            world.ranks[0].step()
        elif world.ranks[1].fence.step < 4:
            world.ranks[1].step()
        time.sleep(0.05)
    thread.join(10)
    assert found
    assert 3 <= found[0] <= 4


def test_ranks_that_run_on_meet_at_some_step(world: World) -> None:
    stop = threading.Event()
    barrier = threading.Barrier(2)

    def run(rank: Rank) -> None:
        while not stop.is_set():
            rank.step()
            try:
                barrier.wait(10)
            except threading.BrokenBarrierError:
                return

    threads = [threading.Thread(target=run, args=(rank,)) for rank in world.ranks]
    for thread in threads:
        thread.start()
    try:
        steps = [world.update() for _ in range(4)]
    finally:
        stop.set()
        for rank in world.ranks:
            rank.fence.end()
        for thread in threads:
            thread.join(20)
        barrier.abort()
    assert steps == sorted(set(steps))


def test_ranks_that_never_meet_make_no_version(world: World) -> None:
    before = world.engine.call_all(live_values)
    world.ranks[1].step()
    for rank in world.ranks:
        rank.fence.end()
    with pytest.raises(UpdateFailedError, match="cannot be had"):
        world.server.update(world.engine.control)
    assert world.engine.call_all(live_values) == before


def test_only_planned_replicas_are_copied(engine: BareEngine) -> None:
    """Two ranks hold everything; each copies the half that the plan takes from it."""
    copied: list[set[str]] = [set(), set()]

    class Counting(ShardSource):
        def __init__(self, rank: int) -> None:
            self.rank = rank
            tensors = {meta.name: torch.full(meta.shape, 5, dtype=getattr(torch, meta.dtype)) for meta in PARAMS}
            pieces = tuple(Piece(name, Box.whole(tuple(t.shape)), lambda t=t: t) for name, t in tensors.items())
            super().__init__(Shards(tuple(meta_of(n, t) for n, t in tensors.items()), pieces), StepFence())

        def read(self, region: SourceRegion, out: memoryview) -> None:
            copied[self.rank].add(region.name)
            super().read(region, out)

    sources = [Counting(0), Counting(1)]
    with ParameterServer(source=sources[0], launch=ThreadCrew(sources[1])) as server:
        server.update(engine.control, UpdateSettings(verify="full"))
    assert engine.call_all(live_values) == [[5.0]] * 2
    assert copied[0]
    assert copied[1]
    assert not copied[0] & copied[1]
    assert copied[0] | copied[1] == {meta.name for meta in PARAMS}
