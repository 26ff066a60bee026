"""The fence: an optimizer waits for readers, readers never see half a step, and training is never held for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import nn

from headrace.errors import HeadraceError, LocalProtocolError, StepMissedError, TransferTimeoutError
from headrace.protocols import SourceRegion
from headrace.store.live import LiveStore
from headrace_trainers.fence import StepFence
from headrace_trainers.optimizers import watch
from headrace_trainers.shards import shards_of
from headrace_trainers.source import ShardSource


class SlowSource(ShardSource):
    """Reads only when it is let."""

    def __init__(self, model: nn.Module, fence: StepFence) -> None:
        super().__init__(shards_of(model), fence)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def read(self, region: SourceRegion, out: memoryview) -> None:
        self.begun.set()
        assert self.go_on.wait(30)
        super().read(region, out)


class World:
    """A model, its optimizer with the fence around it, and a store that copies out of it in a thread."""

    def __init__(self, hold_s: float) -> None:
        torch.manual_seed(1)
        self.model = nn.Linear(33, 17)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.fence = StepFence()
        self.source = SlowSource(self.model, self.fence)
        self.store = LiveStore(self.source, "test")
        self.optimizer.register_step_pre_hook(lambda *_: self.broken.append(self.fence.begin_write(hold_s)))
        self.optimizer.register_step_post_hook(lambda *_: self.fence.end_write())
        self.broken: list[bool] = []
        self.errors: list[HeadraceError] = []

    def fill(self, version: int, step: int) -> threading.Thread:
        self.store.publish(version)

        def run() -> None:
            try:
                self.store.fill(version, step, range(2), deadline_s=30)
            except HeadraceError as error:
                self.errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def step(self) -> None:
        self.model(torch.ones(2, 33)).sum().backward()
        self.optimizer.step()

    def weight(self) -> bytes:
        return bytes(self.model.weight.detach().view(torch.uint8).numpy())

    def held(self, version: int) -> bytes:
        return bytes(self.store.tensors(version)[0][: self.model.weight.nbytes].numpy())


@pytest.fixture
def world() -> Iterator[World]:
    made = World(hold_s=30)
    yield made
    made.source.go_on.set()
    made.store.close()


def test_the_optimizer_waits_for_a_slow_reader(world: World) -> None:
    before = world.weight()
    reader = world.fill(1, 0)
    assert world.source.begun.wait(10)
    trainer = threading.Thread(target=world.step)
    trainer.start()
    trainer.join(0.3)
    assert trainer.is_alive()
    assert world.weight() == before
    world.source.go_on.set()
    reader.join(10)
    trainer.join(10)
    assert world.held(1) == before != world.weight()
    assert world.errors == []
    assert world.broken == [False]
    assert world.fence.held_s > 0.1


def test_training_goes_on_without_a_reader_that_takes_too_long() -> None:
    world = World(hold_s=0.05)
    reader = world.fill(1, 0)
    assert world.source.begun.wait(10)
    world.step()
    world.source.go_on.set()
    reader.join(10)
    assert world.broken == [True]
    assert isinstance(world.errors[0], StepMissedError)
    world.fill(1, 1).join(10)
    assert world.held(1) == world.weight()
    world.store.close()


def test_a_reader_waits_for_a_step_to_come(world: World) -> None:
    world.source.go_on.set()
    reader = world.fill(1, 2)
    world.step()
    first = world.weight()
    world.step()
    reader.join(10)
    assert world.errors == []
    assert world.held(1) == world.weight() != first


def test_a_step_that_is_past_is_missed(world: World) -> None:
    world.source.go_on.set()
    world.step()
    world.fill(1, 0).join(10)
    assert isinstance(world.errors[0], StepMissedError)


def test_a_step_that_broke_off_half_way_is_never_read(world: World) -> None:
    world.source.go_on.set()
    world.fence.begin_write(1)
    world.fence.end()
    world.fill(1, 0).join(10)
    assert isinstance(world.errors[0], StepMissedError)


def test_waiting_for_a_step_has_a_deadline() -> None:
    with pytest.raises(TransferTimeoutError, match="step 1 did not come"), StepFence().reading(1, 0.01):
        pass


def test_nobody_waits_for_a_step_after_the_end() -> None:
    fence = StepFence()
    fence.end()
    with pytest.raises(StepMissedError), fence.reading(1, 30):
        pass
    with fence.reading(0, 0):
        pass


def test_a_step_that_was_not_applied_is_no_step() -> None:
    fence = StepFence()
    fence.begin_write(0)
    fence.end_write(applied=False)
    assert fence.step == 0
    with fence.reading(0, 0):
        pass


def test_a_store_has_one_copy_whose_versions_grow(world: World) -> None:
    world.source.go_on.set()
    world.fill(3, 0).join(10)
    segments = world.store.segments(3)
    with pytest.raises(LocalProtocolError, match="does not grow"):
        world.store.publish(3)
    world.store.release(3)
    world.store.publish(3)
    assert world.store.segments(3) == segments
    assert world.store.versions == (3,)
    with pytest.raises(LocalProtocolError, match="does not hold version 2"):
        world.store.tensors(2)


def test_only_chosen_rows_are_copied(world: World) -> None:
    world.source.go_on.set()
    world.store.publish(1)
    world.store.fill(1, 0, [1])
    assert not any(world.held(1))
    bias = world.store.tensors(1)[0][-(-world.model.weight.nbytes // 64) * 64 :][: world.model.bias.nbytes]
    assert bytes(bias.numpy()) == bytes(world.model.bias.detach().view(torch.uint8).numpy())


def test_held_seconds_grow_only_by_waiting() -> None:
    fence = StepFence()
    begin = time.monotonic()
    for _ in range(100):
        fence.begin_write(1)
        fence.end_write()
    assert fence.step == 100
    assert fence.held_s <= time.monotonic() - begin


def test_tied_parameters_lie_in_one_place() -> None:
    embedding, head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
    head.weight = embedding.weight
    fence = StepFence()
    source = ShardSource(shards_of(nn.ModuleList([embedding, head])), fence)
    store = LiveStore(source, "test")
    table = store.publish(1).manifest.regions
    assert source.aliases() == {1: 0}
    assert table.base.tolist() == [0, 0]
    assert table.param.tolist() == [0, 1]
    store.fill(1, 0, [1])
    assert bytes(store.tensors(1)[0][: 7 * 3 * 4].numpy()) == bytes(head.weight.detach().view(torch.uint8).numpy())
    store.close()


class Noting:
    """Stands where a hook does, and notes when the fence closes and which weight it finds."""

    def __init__(self, model: nn.Linear) -> None:
        self.model = model
        self.noted: list[tuple[str, float]] = []

    def note(self, what: str) -> None:
        self.noted.append((what, float(self.model.weight.detach().sum())))

    def before_step(self) -> None:
        self.note("fence")

    def after_step(self) -> None:
        self.note("end")


class WritesFirst(torch.optim.Optimizer):
    """Looks for a worse point before it takes gradients, as some optimizers do."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(self.param_groups[0]["lr"])
        with torch.enable_grad():
            return closure()


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "LBFGS", "WritesFirst"])
@pytest.mark.parametrize("is_named", [True, False])
def test_the_fence_of_a_step_with_a_closure(kind: str, is_named: bool) -> None:
    """torch's own optimizers change nothing before they have called it; of others nobody knows."""
    model = nn.Linear(3, 2)
    hook = Noting(model)
    optimizer = (WritesFirst if kind == "WritesFirst" else getattr(torch.optim, kind))(model.parameters(), lr=0.1)
    watch(optimizer, hook)  # type: ignore[arg-type]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        hook.note("backward")
        loss = model(torch.ones(3)).square().sum()
        loss.backward()
        return loss

    hook.note("begin")
    loss = optimizer.step(closure=closure) if is_named else optimizer.step(closure)
    assert loss > 0
    names, weights = zip(*hook.noted, strict=True)
    first = ("begin", "fence", "backward") if kind == "WritesFirst" else ("begin", "backward", "fence")
    assert names[:3] == first
    assert names[-1] == "end"
    assert weights[0] == weights[names.index("fence")] != weights[-1]
