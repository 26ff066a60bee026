"""Hugging Face's Trainer and Accelerate, each in its own idiom, into a real engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="trainers and the embedded engine need transformers")
pytest.importorskip("accelerate", reason="the session `trainers` of nox installs Accelerate")

from framework_runs import FLOAT, hugging_face
from trainer_world import batch, compare, gathered, join, join_by_environment, load, optimizer_of

from headrace.errors import HeadraceError
from headrace.testing.engine_process import EngineProcess, free_port
from headrace.testing.ranks import run_ranks


def hf_alone(_rank: int, _world_size: int, url: str, folder: Path, out: Path) -> None:
    trainer, _, found = hugging_face(folder, out, url, gradient_accumulation_steps=2)
    assert found == []
    logged = [entry for entry in trainer.state.log_history if "headrace/version" in entry]
    assert [entry["headrace/step"] for entry in logged] == [1, 2, 3]


@pytest.mark.timeout(150)
def test_trainer_of_hugging_face(engine: EngineProcess, folder: Path, tmp_path: Path) -> None:
    run_ranks(hf_alone, 1, 100, engine.url, folder, tmp_path)


WITHOUT_DEEPSPEED = """
import importlib.util

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
import headrace_trainers.accelerate
import headrace_trainers.transformers
from accelerate.utils import is_deepspeed_available

assert not is_deepspeed_available()
"""


def test_hooks_of_hugging_face_need_no_deepspeed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def hf_again(_rank: int, _world_size: int, url: str, folder: Path, out: Path) -> None:
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer, callback, found = hugging_face(folder, out, url)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    left = callback.hook
    trainer.remove_callback(Interrupt)
    trainer.train()
    with pytest.raises(HeadraceError, match="closed"):
        left._publisher.ask()
    assert found == []


@pytest.mark.timeout(150)
def test_a_trainer_that_was_interrupted_trains_again(engine: EngineProcess, folder: Path, tmp_path: Path) -> None:
    """With one hook: that of the run that broke off is let go."""
    run_ranks(hf_again, 1, 100, engine.url, folder, tmp_path)


def hf_best(_rank: int, _world_size: int, url: str, folder: Path, out: Path) -> None:
    """Train with the highest loss as the best one, which is not the last."""
    kept = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer, _, found = hugging_face(folder, out, url, **kept, **best)
    assert found == []
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert compare(url, gathered(trainer.model), FLOAT, FLOAT) == []


@pytest.mark.timeout(150)
def test_the_best_model_is_served_where_the_trainer_loads_it(
    engine: EngineProcess, folder: Path, tmp_path: Path
) -> None:
    run_ranks(hf_best, 1, 100, engine.url, folder, tmp_path)


def hf_zero(rank: int, world_size: int, port: int, url: str, folder: Path, out: Path, stage: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    join_by_environment(rank, world_size, port)
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "bf16": {"enabled": True},
    }
    trainer, _, found = hugging_face(folder, out / str(rank), url, deepspeed=config, ddp_backend="gloo", bf16=True)
    assert found == []
    assert rank or any("headrace/version" in entry for entry in trainer.state.log_history)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_of_hugging_face_with_deepspeed(
    engine: EngineProcess, folder: Path, tmp_path: Path, stage: int
) -> None:
    pytest.importorskip("deepspeed", reason="the session `trainers` of nox installs DeepSpeed")
    run_ranks(hf_zero, 2, 150, free_port(), engine.url, folder, tmp_path, stage)


def with_accelerate(rank: int, world_size: int, port: int, url: str, folder: Path, out: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    join(rank, world_size, port)
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from headrace_trainers.accelerate import attach

    logged: list[dict[str, float]] = []

    class Tracker(GeneralTracker):
        name = "list"
        requires_logging_directory = False

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            pass

        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            logged.append(values)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with=[Tracker()])
    accelerator.init_trackers("test")
    model = load(folder)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    with attach(accelerator, model, optimizer, to=f"torch={url}", mode="wait", on_error="raise") as hook:
        for number in range(1, 5):
            with accelerator.accumulate(model):
                tokens = batch(number, rank)
                accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
                optimizer.step()
                optimizer.zero_grad()
            assert hook.step == number // 2
            if rank == 0 and number % 2 == 0:
                assert compare(url, gathered(model), FLOAT, FLOAT) == []
    assert rank or [entry["headrace/step"] for entry in logged] == [1, 2]


@pytest.mark.timeout(150)
def test_accelerate(engine: EngineProcess, folder: Path, tmp_path: Path) -> None:
    run_ranks(with_accelerate, 2, 100, free_port(), engine.url, folder, tmp_path)
