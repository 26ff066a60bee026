"""Shards on GPUs: every byte after every step, copies beside training, and a fence that only the GPU waits at."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from shaped_trainer import STEPS, train
from torch import nn

from headrace.errors import CapacityError, HeadraceError, StepMissedError
from headrace.protocols import SourceRegion
from headrace.segments.cudart import CudaRuntime
from headrace.store.live import LiveStore
from headrace.testing.engine_process import free_port
from headrace.testing.ranks import run_ranks
from headrace_trainers.batches import ALIGN, STRAIGHT_BYTES, Target
from headrace_trainers.device_reads import SCRATCH_BYTES, DeviceCopier, Job, wait_events
from headrace_trainers.fence import StepFence
from headrace_trainers.shards import shards_of
from headrace_trainers.source import ShardSource

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(200)]

SIZE = 4096
SECOND = 2_000_000_000
"""Cycles of a GPU's clock; it stands still for about so long."""
MODULUS = 200
"""Up to here bfloat16 has all integers."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("engine_device", ["cuda", "cpu"])
@pytest.mark.parametrize("layout", ["plain", "fsdp2"])
def test_every_byte_after_every_step(layout: str, engine_device: str) -> None:
    """Published in bfloat16 from float32 masters, into two workers on the same GPU or on the CPU."""
    found, steps = run_ranks(train, 1, 150, free_port(), layout, "cuda", engine_device)[0]
    assert found == []
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.gpu(2)
def test_every_byte_of_two_ranks_after_every_step() -> None:
    found, steps = run_ranks(train, 2, 150, free_port(), "fsdp2", "cuda", "cuda")[0]
    assert found == []
    assert steps == list(range(1, STEPS + 1))


class World:
    """Layers in float32, published in bfloat16; every element is the number of the step, modulo MODULUS."""

    def __init__(self) -> None:
        self.model = nn.Sequential(*(nn.Linear(SIZE, SIZE, device="cuda") for _ in range(4)))
        for parameter in self.model.parameters():
            nn.init.zeros_(parameter)
        self.fence = StepFence()
        self.source = ShardSource(shards_of(self.model), self.fence, dtype="bfloat16")
        self.source.mark_written()
        self.store = LiveStore(self.source, "gpu")
        self.errors: list[HeadraceError] = []
        self.version = 0
        self.fill(0)  # page-locks, makes the streams

    def step(self) -> None:
        assert not self.fence.begin_write(60)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_((self.fence.step + 1) % MODULUS)
        self.source.mark_written()
        self.fence.end_write()

    def fill(self, step: int) -> None:
        self.version += 1
        self.store.publish(self.version)
        self.store.fill(self.version, step, range(8), deadline_s=60)

    def fill_beside(self, step: int) -> threading.Thread:
        def run() -> None:
            try:
                self.fill(step)
            except HeadraceError as error:
                self.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def held(self) -> list[float]:
        """Return the least and the greatest values of all tensors that were copied, once each."""
        assert self.store._layout is not None
        found: set[float] = set()
        for slot in self.store._layout.slots:
            memory = self.store.tensors(self.version)[slot.segment][slot.begin : slot.begin + slot.num_bytes]
            found |= {value.item() for value in memory.view(torch.bfloat16).aminmax()}
        return sorted(found)

    def slow_down(self, cycles: int) -> None:
        """Have the copies' streams stand still before what they are given next."""
        for lane in self.source.copier(torch.device("cuda", 0))._lanes:
            lane.run(lambda: torch.cuda._sleep(cycles))


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    torch.cuda.synchronize()
    made.store.close()
    made.source.close()


def until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_a_step_is_copied_whole_while_the_gpu_is_busy(world: World) -> None:
    assert world.source.on_gpu
    busy = torch.randn(SIZE, SIZE, device="cuda")
    for step in range(1, 6):
        for _ in range(30):
            busy = torch.tanh(busy @ busy)
        world.step()
        world.fill(step)
        assert world.held() == [float(step)]


def test_copies_do_not_wait_for_what_training_does_next(world: World) -> None:
    """They end while the training stream is still at what came behind the step: they lie on streams of their own."""
    world.step()
    torch.cuda._sleep(2 * SECOND)
    after = torch.cuda.current_stream().record_event()
    world.fill(1)
    assert not after.query()
    assert world.held() == [1.0]


def test_copies_wait_for_the_work_that_makes_the_step(world: World) -> None:
    torch.cuda._sleep(SECOND // 2)
    world.step()
    written = world.source.written(torch.device("cuda", 0))
    assert written is not None
    reader = world.fill_beside(1)
    until(lambda: world.fence._orders)
    assert not written.query()
    reader.join(60)
    assert written.query()
    assert world.held() == [1.0]


def test_the_gpu_waits_for_a_slow_reader_and_the_training_thread_does_not(world: World) -> None:
    world.step()
    world.slow_down(2 * SECOND)
    reader = world.fill_beside(1)
    until(lambda: world.fence._orders)  # the copies are given; the host has nothing more to read
    copied = [mark for marks in _newest(world)._copied.values() for mark in marks]
    world.step()
    world.step()
    written = world.source.written(torch.device("cuda", 0))
    assert written is not None
    assert not any(mark.query() for mark in copied)
    assert not written.query()
    assert reader.is_alive()
    reader.join(60)
    assert world.held() == [1.0]
    assert world.errors == []
    torch.cuda.synchronize()
    assert world.model[0].weight.unique().tolist() == [3.0]


def _newest(world: World) -> object:
    assert world.store._reads is not None
    return world.store._reads


def test_an_optimizer_that_runs_on_never_tears_a_slow_readers_tensors(world: World) -> None:
    stop = threading.Event()

    def run() -> None:
        torch.cuda.set_device(0)
        while not stop.is_set():
            world.step()
        world.fence.end()

    trainer = threading.Thread(target=run, daemon=True)
    trainer.start()
    filled, attempt = [], 0
    try:
        while len(filled) < 10:
            step = world.source.offer(attempt)
            world.slow_down(20_000_000)
            try:
                world.fill(step)
            except StepMissedError:
                attempt += 1
                continue
            attempt = 0
            assert world.held() == [float(step % MODULUS)]
            filled.append(step)
    finally:
        stop.set()
        trainer.join(60)
    assert filled == sorted(set(filled))


def test_extra_memory_of_the_gpu_is_bounded_by_the_scratch(world: World) -> None:
    world.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    world.fill(1)
    assert torch.cuda.max_memory_allocated() - before <= 1 << 20
    lanes = world.source.copier(torch.device("cuda", 0))._lanes
    assert sum(lane.scratch.nbytes for lane in lanes) == SCRATCH_BYTES
    published = sum(p.numel() * 2 for p in world.model.parameters())
    assert published > 2 * SCRATCH_BYTES


def test_memory_is_page_locked_as_one_piece_and_once(world: World) -> None:
    pinned = world.store._pinned
    assert pinned is not None
    assert [len(one._chunks) for one in pinned] == [1]
    assert world.store._segments[0].tensor.is_pinned()
    world.step()
    world.fill(1)
    assert world.store._pinned is pinned


def test_pageable_memory_does_where_a_limit_forbids_page_locking(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_args: object, **_options: object) -> None:
        raise CapacityError("page-locking failed; raise `ulimit -l`")

    monkeypatch.setattr(CudaRuntime, "register", refuses)
    with caplog.at_level(logging.WARNING):
        world = World()
        world.step()
        world.fill(1)
    assert world.held() == [1.0]
    assert sum("ulimit -l" in record.message for record in caplog.records) == 1
    world.store.close()


class Mixed(nn.Module):
    """One of each: in host memory, tied, transposed, of the published dtype already, empty, small, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.offloaded = nn.Parameter(torch.randn(300, 70))
        self.embed = nn.Embedding(1000, 128, device="cuda")
        self.head = nn.Linear(128, 1000, bias=False)
        self.head.weight = self.embed.weight
        self.transposed = nn.Parameter(torch.randn(200, 333, device="cuda").t())
        self.ready = nn.Parameter(torch.randn(STRAIGHT_BYTES + 3, device="cuda", dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.randn((), device="cuda"))
        self.small = nn.ParameterList(nn.Parameter(torch.randn(n, device="cuda")) for n in range(1, 200))
        self.register_buffer("counts", torch.arange(77, device="cuda"))


def test_all_kinds_of_shards_in_one_rank() -> None:
    torch.manual_seed(4)
    model, fence = Mixed(), StepFence()
    source = ShardSource(shards_of(model), fence, dtype="bfloat16")
    source.mark_written()
    store = LiveStore(source, "mixed")
    store.publish(1)
    store.fill(1, 0, range(len(source.regions())), deadline_s=60)
    assert store._layout is not None
    right = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for slot in store._layout.slots:
        tensor = right[slot.region.name].detach()
        cast = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        expected = cast.cpu().contiguous().view(-1).view(torch.uint8)
        memory = store.tensors(1)[slot.segment][slot.begin : slot.begin + slot.num_bytes]
        assert torch.equal(memory, expected), slot.region.name
        out = bytearray(slot.num_bytes)
        source.read(SourceRegion(slot.region.name, slot.region.box), memoryview(out))
        assert bytes(out) == bytes(expected.numpy()), slot.region.name
    store.close()
    source.close()


@pytest.mark.parametrize("into", FLOATS, ids=str)
@pytest.mark.parametrize("kind", FLOATS, ids=str)
@pytest.mark.parametrize("scratch_bytes", [4096, 1 << 20])
def test_casts_are_those_of_torch(kind: torch.dtype, into: torch.dtype, scratch_bytes: int) -> None:
    """Of every exponent, subnormal and infinite; in pieces, and gathered."""
    wide = (torch.randn(50_000) * torch.logspace(-44, 38, 50_000)).to(kind).cuda()
    parts = [wide, wide[::3], wide[:48_000].view(60, 800).t(), *wide[:999].split(7)]
    jobs, at = [], 0
    for part in parts:
        jobs.append(Job(lambda part=part: part, Target(into, 0, at)))
        at += -(-part.numel() * into.itemsize // ALIGN) * ALIGN
    segment = torch.zeros(at, dtype=torch.uint8).pin_memory()
    written = torch.cuda.current_stream().record_event()
    copied, alive = DeviceCopier(torch.device("cuda", 0), scratch_bytes=scratch_bytes).submit(jobs, [segment], written)
    wait_events(copied, 30, "copying")
    assert len(alive) == len(parts)
    for part, job in zip(parts, jobs, strict=True):
        size = part.numel() * into.itemsize
        expected = part.to(into).cpu().contiguous().view(-1).view(torch.uint8)
        assert torch.equal(segment[job.target.begin : job.target.begin + size], expected)
