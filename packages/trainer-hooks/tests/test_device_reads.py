"""Shards on a GPU, emulated by threads: what is ordered against what, and who waits for whom."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from emulated_gpu import EmulatedGpuSource, Stream
from torch import nn

from headrace.errors import HeadraceError, StepMissedError, TransferTimeoutError
from headrace.geometry import Box
from headrace.protocols import WeightSource
from headrace.store import live
from headrace.store.live import LiveStore
from headrace.testing.source_suite import SteppedSourceTests
from headrace_trainers import source as sources
from headrace_trainers.device_reads import SCRATCH_BYTES
from headrace_trainers.fence import StepFence
from headrace_trainers.shards import shards_of
from headrace_trainers.shards.tensors import flat_pieces, meta_of
from headrace_trainers.source import Piece, Shards

SIZE = 96


class World:
    """A module whose every element is the number of the step, written by the training stream; published in bfloat16."""

    def __init__(self) -> None:
        Stream.made.clear()
        self.model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 3))
        for parameter in self.model.parameters():
            nn.init.zeros_(parameter)
        self.fence = StepFence()
        self.source = EmulatedGpuSource(shards_of(self.model), self.fence, dtype="bfloat16").start()
        self.store = LiveStore(self.source, "emulated")
        self.errors: list[HeadraceError] = []

    def write(self) -> None:
        for parameter in self.model.parameters():
            parameter.add_(1.0)

    def step(self, hold_s: float = 30.0) -> bool:
        """Give the training stream a step; returns whether readers had to be broken off."""
        broken = self.fence.begin_write(hold_s)
        self.source.training.run(self.write)
        self.source.mark_written()
        self.fence.end_write()
        return broken

    def fill(self, version: int, step: int, deadline_s: float = 30.0) -> threading.Thread:
        self.store.publish(version)

        def run() -> None:
            try:
                self.store.fill(version, step, range(4), deadline_s=deadline_s)
            except HeadraceError as error:
                self.errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def held(self, version: int) -> list[float]:
        """Return the distinct values of all that was copied."""
        memory = self.store.tensors(version)[0]
        found = set()
        for slot in self.store._layout.slots:
            found |= set(memory[slot.begin : slot.begin + slot.num_bytes].view(torch.bfloat16).tolist())
        return sorted(found)

    def lanes(self) -> list[Stream]:
        return [stream for stream in Stream.made if stream.scratch.numel()]


@pytest.fixture
def world(caplog: pytest.LogCaptureFixture) -> Iterator[World]:
    caplog.set_level(logging.ERROR)
    made = World()
    yield made
    made.store.close()


class TestConformance(SteppedSourceTests):
    """Two ranks with half of every parameter's flat order each, cast on the way."""

    def advance(self, source: WeightSource, change: Callable[[], None]) -> None:
        assert isinstance(source, EmulatedGpuSource)
        source._fence.begin_write(30)
        change()
        source.mark_written()
        source._fence.end_write()

    def make_sources(self, folder: Path) -> tuple[Sequence[WeightSource], Mapping[str, torch.Tensor]]:
        tensors = {"a": torch.randn(7, 5, 3), "b": torch.randn(13), "c": torch.randn(11, 3)}
        metas = tuple(meta_of(name, tensor) for name, tensor in tensors.items())
        sources = []
        for rank in range(2):
            pieces: list[Piece] = []
            for name, tensor in tensors.items():
                half = -(-tensor.numel() // 2)
                first, last = rank * half, min((rank + 1) * half, tensor.numel())
                shard = tensor.flatten()[first:last].clone()
                pieces += flat_pieces(name, tuple(tensor.shape), first, last, lambda shard=shard: shard)
            shards = Shards(metas, tuple(pieces))
            sources.append(EmulatedGpuSource(shards, StepFence(), dtype="bfloat16").start())
        return sources, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def until(condition: object) -> None:
    limit = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_copies_come_after_the_work_that_makes_the_step(world: World) -> None:
    busy = world.source.training.block()
    assert not world.step()
    reader = world.fill(1, 1)
    until(world.lanes)
    reader.join(0.1)
    assert reader.is_alive()
    busy.set()
    reader.join(20)
    assert world.held(1) == [1.0]
    assert world.errors == []


def test_every_step_is_copied_whole(world: World) -> None:
    for step in range(1, 6):
        world.step()
        world.fill(step, step).join(20)
        assert world.held(step) == [float(step)]
    assert world.errors == []
    assert sum(lane.scratch.numel() for lane in world.lanes()) == SCRATCH_BYTES
    assert len(world.lanes()) == 2


def test_the_gpu_waits_for_its_reads_and_the_training_thread_does_not(world: World) -> None:
    world.step()
    world.fill(1, 1).join(20)
    slow = [lane.block() for lane in world.lanes()]
    reader = world.fill(2, 1)
    until(lambda: world.fence._orders)
    assert not world.step()
    assert not world.step()
    assert world.fence.held_s < 1.0
    assert reader.is_alive()
    assert world.model[0].bias[0].item() == 1.0  # the write waits on the training stream
    for lane in slow:
        lane.set()
    reader.join(20)
    assert world.held(2) == [1.0]
    until(world.source._written[torch.device("cpu")].query)
    assert world.model[0].bias[0].item() == 3.0
    assert world.errors == []


def test_a_reader_that_was_broken_off_is_told(world: World) -> None:
    """Training was not held back behind it, as it had not come to its copies yet."""

    def read_too_late() -> None:
        with world.source.at(0, 0.0) as reads:
            assert world.step(hold_s=0.01)
            assert reads is not None
            reads.wait(10.0)
            assert not world.fence._orders

    with pytest.raises(StepMissedError):
        read_too_late()


def test_copies_that_do_not_end_have_a_deadline(world: World) -> None:
    world.fill(1, 0).join(20)
    slow = [lane.block() for lane in world.lanes()]
    world.fill(2, 0, deadline_s=0.1).join(20)
    assert isinstance(world.errors[0], TransferTimeoutError)
    assert not world.step()  # nobody reads any more
    for lane in slow:
        lane.set()
    world.fill(2, 1).join(20)
    assert world.held(2) == [1.0]


def test_memory_that_a_gpu_writes_to_is_not_given_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_SETTLE_S", 0.05)
    monkeypatch.setattr(live, "_in_flight", [])
    world.fill(1, 0).join(20)
    world.store.close()
    assert live._in_flight == []
    slow = [lane.block() for lane in world.lanes()]
    world.fill(2, 0, deadline_s=0.05).join(20)
    world.store.close()
    assert len(live._in_flight) == 1
    for lane in slow:
        lane.set()


def test_pageable_memory_does_where_page_locking_fails(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """As in this process, which has no CUDA runtime."""
    caplog.set_level(logging.WARNING)
    for version in (1, 2):
        world.fill(version, 0).join(20)
    assert world.held(2) == [0.0]
    warnings = [record.message for record in caplog.records if "pageable" in record.message]
    assert len(warnings) == 1
    assert "install a torch that is built for CUDA" in warnings[0]


def test_shards_may_be_exchanged_between_steps(world: World) -> None:
    world.fill(1, 0).join(20)
    for number, parameter in enumerate(world.model.parameters()):
        parameter.data = torch.full_like(parameter, 7.0).t().contiguous().t() if number == 0 else parameter + 7.0
    world.fill(2, 0).join(20)
    assert world.held(2) == [7.0]


def test_part_of_a_rank_may_lie_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is held until that part is read, and the other one only holds back the GPU."""
    world = World()
    offloaded = {"1.weight", "1.bias"}
    device_job = world.source.device_job
    monkeypatch.setattr(
        world.source, "device_job", lambda slot: None if slot.region.name in offloaded else device_job(slot)
    )
    begun, go_on = threading.Event(), threading.Event()
    read = world.source.read

    def slow_read(region: object, out: memoryview) -> None:
        begun.set()
        assert go_on.wait(20)
        read(region, out)  # type: ignore[arg-type]

    monkeypatch.setattr(world.source, "read", slow_read)
    busy = world.source.training.block()
    world.step()
    reader = world.fill(1, 1)
    assert not begun.wait(0.1)  # the host's part may come from a GPU that is still at work
    busy.set()
    assert begun.wait(20)
    assert world.step(hold_s=0.05)
    go_on.set()
    reader.join(20)
    assert isinstance(world.errors.pop(), StepMissedError)
    world.fill(1, 2).join(20)
    assert world.held(1) == [2.0]
    assert world.errors == []
    world.store.close()


def test_tied_weights_are_copied_once() -> None:
    Stream.made.clear()
    embedding, head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
    head.weight = embedding.weight
    source = EmulatedGpuSource(shards_of(nn.ModuleList([embedding, head])), StepFence()).start()
    store = LiveStore(source, "tied")
    store.publish(1)
    store.fill(1, 0, [0, 1])
    assert len(source.copier(torch.device("cpu"))._key[0]) == 1
    assert bytes(store.tensors(1)[0][: 7 * 3 * 4].numpy()) == bytes(head.weight.detach().view(torch.uint8).numpy())
    store.close()


def test_computed_shards_are_made_one_after_the_other_on_the_copies_stream() -> None:
    Stream.made.clear()
    threads = []
    weights = [torch.full((SIZE, SIZE), float(i)) for i in range(4)]

    def piece(number: int) -> Piece:
        def merged() -> torch.Tensor:
            threads.append(threading.current_thread())
            return weights[number] + 10.0

        return Piece(f"w{number}", Box.whole((SIZE, SIZE)), merged, origin=lambda: weights[number])

    metas = tuple(meta_of(f"w{i}", weight) for i, weight in enumerate(weights))
    source = EmulatedGpuSource(Shards(metas, tuple(piece(i) for i in range(4))), StepFence()).start()
    assert threads == []
    store = LiveStore(source, "computed")
    store.publish(1)
    store.fill(1, 0, [0, 1, 3])
    held = store.tensors(1)[0].view(torch.float32).view(4, -1)
    assert [sorted(set(row.tolist())) for row in held] == [[10.0], [11.0], [0.0], [13.0]]
    assert len(threads) == 3
    assert threading.current_thread() not in threads
    store.close()


def test_the_work_that_makes_a_step_has_a_deadline_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host must wait for it: for what lies in its own memory."""
    world = World()
    monkeypatch.setattr(world.source, "device_job", lambda _slot: None)
    busy = world.source.training.block()
    world.step()
    world.fill(1, 1, deadline_s=0.05).join(20)
    assert isinstance(world.errors[0], TransferTimeoutError)
    busy.set()
    world.store.close()


def test_a_single_region_is_read_on_a_stream_too(world: World) -> None:
    busy = world.source.training.block()
    world.step()
    threading.Timer(0.1, busy.set).start()
    (region,) = [one for one in world.source.regions() if one.name == "1.bias"]
    out = bytearray(6)
    world.source.read(region, memoryview(out))
    assert torch.frombuffer(out, dtype=torch.bfloat16).tolist() == [1.0] * 3
    assert sources._READ_S > 1
