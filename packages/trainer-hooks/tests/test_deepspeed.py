"""DeepSpeed on three ranks into a real engine with two workers: after each step all live tensors are the trainer's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="trainers and the embedded engine need transformers")
pytest.importorskip("deepspeed", reason="the session `trainers` of nox installs DeepSpeed")

import torch
from deepspeed_layouts import LAYOUTS, make
from trainer_world import batch, compare, count_collectives, join

from headrace.errors import ConfigError
from headrace.testing.engine_process import EngineProcess, free_port
from headrace.testing.ranks import run_ranks
from headrace_trainers import deepspeed as hooks

STEPS = 2
SKIPPED = "a skipped step"


def train(rank: int, world_size: int, port: int, url: str, folder: Path, names: list[str]) -> dict[str, list[str]]:
    join(rank, world_size, port)
    return {name: train_one(rank, url, folder, name) for name in names} | {SKIPPED: skip_one(rank, url, folder)}


def train_one(rank: int, url: str, folder: Path, name: str) -> list[str]:
    torch.manual_seed(5)
    trainer = make(folder, **LAYOUTS[name])
    dtype = torch.float32 if LAYOUTS[name].get("bf16") is False else torch.bfloat16
    found, reports = [], []
    with hooks.attach(
        trainer.model, to=f"torch={url}", mode="wait", on_error="raise", report=reports.append
    ) as hook:
        count_collectives(hook, found)
        for step in range(1, STEPS + 1):
            trainer.step(batch(step, rank))
            whole = trainer.whole()
            if rank == 0:
                found += [f"step {step}: {one}" for one in compare(url, whole, dtype, torch.float32)]
        found += [] if hook.step == STEPS else [f"{hook.step} steps were counted"]
    if rank == 0 and [report.step for report in reports] != [1, 2]:
        found.append(f"reports of {[report.step for report in reports]}")
    return found


def skip_one(rank: int, url: str, folder: Path) -> list[str]:
    """Take a step whose gradients overflow, between two others; DeepSpeed does not apply it."""
    trainer, reports = make(folder, **LAYOUTS["zero1"]), []
    choices: dict[str, Any] = {"to": f"torch={url}", "mode": "wait", "on_error": "raise", "report": reports.append}
    with hooks.attach(trainer.model, **choices) as hook:
        for step, factor in enumerate((1.0, float("inf"), 1.0)):
            tokens = batch(step, rank)
            trainer.model.backward(trainer.model(input_ids=tokens, labels=tokens).loss * factor)
            trainer.model.step()
            assert trainer.model.was_step_applied() == (factor == 1.0)
            assert hook.step == (1, 1, 2)[step]
        whole = trainer.whole()
    found = compare(url, whole, torch.bfloat16, torch.float32) if rank == 0 else []
    return found if rank or [report.step for report in reports] == [1, 2] else [*found, f"reports: {reports}"]


def refuse_stages(rank: int, world_size: int, port: int) -> None:
    join(rank, world_size, port)
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
    model = PipelineModule(layers=[torch.nn.Linear(4, 4)], num_stages=1, loss_fn=torch.nn.MSELoss())
    config = {"train_micro_batch_size_per_gpu": 2}
    optimizer = torch.optim.SGD(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    with pytest.raises(ConfigError, match="pipeline stages"):
        hooks.attach(engine, to="torch=http://127.0.0.1:9")


@pytest.mark.timeout(150)
def test_an_engine_with_pipeline_stages_is_refused() -> None:
    """It steps inside of `train_batch`, where nothing would be fenced or published."""
    run_ranks(refuse_stages, 1, 100, free_port())


@pytest.fixture(scope="module")
def on_three_ranks(folder: Path) -> Iterator[dict[str, list[str]]]:
    with EngineProcess(folder, 2, "--dtype", "float32") as engine:
        yield run_ranks(train, 3, 280, free_port(), engine.url, folder, list(LAYOUTS))[0]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_parameter_after_every_step(on_three_ranks: dict[str, list[str]], name: str) -> None:
    assert on_three_ranks[name] == []


@pytest.mark.timeout(400)
def test_a_step_that_overflows_is_not_published(on_three_ranks: dict[str, list[str]]) -> None:
    assert on_three_ranks[SKIPPED] == []
