"""Shards on a GPU: copied on a stream of their own, after the step that made them and before the next one's writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from headrace.store.live import LiveStore
from headrace_trainers.fence import StepFence
from headrace_trainers.shards import shards_of
from headrace_trainers.source import ShardSource

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(200),
]
SIZE = 4096


class World:
    """A layer in float32, published in bfloat16, and work that keeps its GPU busy before and after every step."""

    def __init__(self) -> None:
        self.model = nn.Linear(SIZE, SIZE, bias=False, device="cuda")
        nn.init.zeros_(self.model.weight)
        self.fence = StepFence()
        self.source = ShardSource(shards_of(self.model), self.fence, dtype="bfloat16")
        self.store = LiveStore(self.source, "gpu")
        self.busy = torch.randn(SIZE, SIZE, device="cuda")

    def step(self) -> None:
        self.fence.begin_write(30)
        for _ in range(30):
            self.busy = torch.tanh(self.busy @ self.busy)
        with torch.no_grad():
            self.model.weight.add_(1.0)
        self.source.mark_written()
        self.fence.end_write()

    def held(self, version: int) -> torch.Tensor:
        return self.store.tensors(version)[0][: SIZE * SIZE * 2].view(torch.bfloat16)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.store.close()


def test_a_step_is_copied_whole_while_the_gpu_is_busy(world: World) -> None:
    assert world.source.on_gpu
    for step in range(1, 6):
        world.step()
        world.store.publish(step)
        world.store.fill(step, step, [0])
        assert world.held(step).unique().tolist() == [float(step)]


def test_memory_is_page_locked_as_one_piece(world: World) -> None:
    world.step()
    world.store.publish(1)
    world.store.fill(1, 1, [0])
    assert len(world.store._pinned) == 1
    assert len(world.store._pinned[0]._chunks) == 1
