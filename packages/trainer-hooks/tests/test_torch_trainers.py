"""Every trainer of torch itself into a real engine: each step, every live tensor is the trainer's; no collectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="trainers and the embedded engine need transformers")

import torch
from torch_layouts import LAYOUTS
from trainer_world import batch, compare, count_collectives, join

from headrace.testing.engine_process import EngineProcess, free_port
from headrace.testing.ranks import run_ranks
from headrace_trainers import fsdp

STEPS = 3
RESHARDED = ("fsdp2", "fsdp1-full", "ddp")


def train(rank: int, world_size: int, port: int, url: str, folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Train in every layout, one after the other, and return what was wrong after any step."""
    join(rank, world_size, port)
    return {name: train_one(rank, url, folder, name) for name in names}


def train_one(rank: int, url: str, folder: Path, name: str) -> list[str]:
    found = []
    torch.manual_seed(5)
    trainer = LAYOUTS[name](folder)
    data_rank = {"plain": 0, "fsdp2-tp": rank // 2}.get(name, rank)
    reports = []
    with fsdp.attach(
        trainer.model, trainer.optimizer, to=f"torch={url}", mode="wait", on_error="raise", report=reports.append
    ) as hook:
        count_collectives(hook, found)
        for step in range(1, STEPS + 1):
            trainer.step(batch(step, data_rank))
            whole = trainer.whole()
            if rank == 0:
                found += [f"step {step}: {one}" for one in compare(url, whole, torch.float32, torch.float32)]
        found += [] if hook.step == STEPS else [f"{hook.step} steps were counted"]
    if rank == 0 and [report.step for report in reports] != [1, 2, 3]:
        found.append(f"reports of {[report.step for report in reports]}")
    return found


@pytest.fixture(scope="module")
def on_four_ranks(folder: Path) -> Iterator[dict[str, list[str]]]:
    with EngineProcess(folder, 1, "--dtype", "float32") as engine:
        yield run_ranks(train, 4, 200, free_port(), engine.url, folder, list(LAYOUTS))[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_parameter_after_every_step(on_four_ranks: dict[str, list[str]], name: str) -> None:
    assert on_four_ranks[name] == []


@pytest.fixture(scope="module")
def on_three_ranks(folder: Path) -> Iterator[dict[str, list[str]]]:
    with EngineProcess(folder, 2, "--dtype", "float32") as engine:
        yield run_ranks(train, 3, 100, free_port(), engine.url, folder, RESHARDED)[0]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", RESHARDED)
def test_three_ranks_into_two_workers(on_three_ranks: dict[str, list[str]], name: str) -> None:
    assert on_three_ranks[name] == []


def attach_late(rank: int, world_size: int, port: int, url: str, folder: Path) -> dict[str, list[str]]:
    """Attach after a step and an evaluation, which leaves the root's parameters gathered."""
    join(rank, world_size, port)
    found: dict[str, list[str]] = {}
    for name in ("fsdp2", "fsdp1-full-orig", "fsdp1-grad-op"):
        trainer = LAYOUTS[name](folder)
        trainer.step(batch(1, rank))
        with torch.no_grad():
            trainer.model(input_ids=batch(2, rank))
        with fsdp.attach(trainer.model, trainer.optimizer, to=f"torch={url}", mode="wait", on_error="raise") as hook:
            hook.flush()
            before = trainer.whole()
            wrong = compare(url, before, torch.float32, torch.float32) if rank == 0 else []
            trainer.step(batch(3, rank))
            after = trainer.whole()
            wrong += compare(url, after, torch.float32, torch.float32) if rank == 0 else []
        found[name] = wrong
    return found


@pytest.mark.timeout(150)
def test_attached_after_an_evaluation(folder: Path) -> None:
    with EngineProcess(folder, 1, "--dtype", "float32") as engine:
        found = run_ranks(attach_late, 2, 100, free_port(), engine.url, folder)[0]
    assert not any(found.values()), found
