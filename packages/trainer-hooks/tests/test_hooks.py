"""What a hook does besides being right: background, dropping, choices, engines that are down, and how it is told."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="trainers and the embedded engine need transformers")

import torch
import torch.distributed as dist
from torch_layouts import LAYOUTS
from trainer_world import ODD, Trainer, Witness, batch, collectives, compare, join

from headrace.errors import UpdateFailedError
from headrace.testing.engine_process import EngineProcess, Stream, differences, free_port
from headrace.testing.ranks import RankError, run_ranks
from headrace.testing.tiny_model import make_tiny_qwen3
from headrace_trainers import StepReport, fsdp, plain

FLOAT = torch.float32


def in_background(rank: int, url: str, trainer: Trainer) -> None:
    """Steps beside an update are dropped, every version is one whole step, and the last one is served in the end."""
    weights, reports, witness = {0: trainer.whole()}, [], Witness(url)
    with fsdp.attach(trainer.model, trainer.optimizer, to=[witness], report=reports.append):
        for step in range(1, 31):
            trainer.step(batch(step, rank))
            weights[step] = trainer.whole()
            if step == 15:
                witness.go_on.set()
    if rank == 0:
        steps = [report.step for report in reports]
        assert steps == sorted(set(steps)), steps
        assert steps[-1] == 30
        assert len(steps) == len(witness.seen)
        assert sum(step <= 15 for step in steps) <= 2, steps
        for step, (version, seen) in zip(steps, witness.seen, strict=True):
            assert differences(seen, weights[step]) == [], f"version {version}, step {step}"
    witness.close()


def every_third_in_bfloat16(rank: int, url: str, trainer: Trainer) -> None:
    reports: list[StepReport] = []
    choices = {"every": 3, "mode": "wait", "dtype": "bfloat16", "report": reports.append}
    with fsdp.attach(trainer.model, trainer.optimizer, to=f"torch={url}", **choices) as hook:
        for step in range(1, 8):
            trainer.step(batch(step, rank))
            weights = trainer.whole()
            if rank == 0 and step % 3 == 0:
                assert compare(url, weights, torch.bfloat16, FLOAT) == []
        if rank == 0:
            assert [report.step for report in reports] == [3, 6]
            assert reports[0].held_s >= reports[0].update.total_s * 0.5
        hook.flush()
    if rank == 0:
        assert [report.step for report in reports] == [3, 6, 7]
        metrics = reports[-1].as_metrics()
        assert metrics["headrace/step"] == 7
        assert metrics["headrace/failed_engines"] == 0
        assert {"headrace/version", "headrace/stall_s", "headrace/total_s", "headrace/held_s"} <= metrics.keys()


def without_collectives(rank: int, url: str, trainer: Trainer) -> None:
    """Every process group counts its collectives: a step with an update has as many as one without."""

    def step_takes(step: int) -> dict[str, int]:
        before = collectives()
        trainer.step(batch(step, rank))
        return {name: count - before[name] for name, count in collectives().items()}

    trainer.step(batch(0, rank))
    usual = step_takes(1)
    assert any(usual.values())
    with fsdp.attach(trainer.model, trainer.optimizer, to=f"torch={url}", mode="wait", on_error="raise") as hook:
        assert step_takes(2) == step_takes(3) == usual
        before = collectives()
        hook.flush()
        assert collectives() == before


def one_engine_down(rank: int, url: str, trainer: Trainer) -> None:
    """The one that answers is updated; the other one is told of, once per step, and training goes on."""
    down, reports = f"torch=http://127.0.0.1:{free_port()}", []
    choices = {"mode": "wait", "report": reports.append, "update": quick()}
    with fsdp.attach(trainer.model, trainer.optimizer, to=[down, f"torch={url}"], **choices):
        for step in range(1, 3):
            trainer.step(batch(step, rank))
            weights = trainer.whole()
            if rank == 0:
                assert compare(url, weights, FLOAT, FLOAT) == []
                assert list(reports[-1].failures) == [down]
    if rank == 0:
        assert [report.step for report in reports] == [1, 2, 2]


def all_ranks_raise(rank: int, _url: str, trainer: Trainer) -> None:
    down = f"torch=http://127.0.0.1:{free_port()}"
    choices = {"mode": "wait", "on_error": "raise", "update": quick()}
    hook = fsdp.attach(trainer.model, trainer.optimizer, to=down, **choices)
    with pytest.raises(UpdateFailedError, match="not ready"):
        trainer.step(batch(1, rank))
    hook.close(publish=False)
    trainer.step(batch(2, rank))


def all_ranks_raise_later(rank: int, _url: str, trainer: Trainer) -> None:
    """In the background, a failure raises at one of the next steps, on every rank; also for who goes on after it."""
    down = f"torch=http://127.0.0.1:{free_port()}"
    hook = fsdp.attach(trainer.model, trainer.optimizer, to=down, on_error="raise", update=quick())
    for _ in range(2):
        with pytest.raises(UpdateFailedError, match="not ready"):
            _train_on(trainer, rank)
        steps: list[Any] = [None, None]
        dist.all_gather_object(steps, hook.step)
        assert steps[0] == steps[1]
    hook.close(publish=False)


def _train_on(trainer: Trainer, rank: int) -> None:
    for step in range(1, 400):
        trainer.step(batch(step, rank))
        time.sleep(0.02)


def accumulated_and_skipped(rank: int, url: str, trainer: Trainer) -> None:
    """Backward passes without a step publish nothing, and a logger that fails is no reason to stop."""

    def fails(_report: StepReport) -> None:
        raise ValueError("a logger of the user's")

    choices = {"mode": "wait", "report": fails}
    with fsdp.attach(trainer.model, trainer.optimizer, to=f"torch={url}", **choices) as hook:
        for step in range(1, 4):
            tokens = batch(step, rank)
            trainer.model(input_ids=tokens, labels=tokens).loss.backward()
        assert hook.step == 0
        assert hook.last_report is None
        trainer.optimizer.step()
        assert hook.step == 1
        assert rank or hook.last_report.step == 1


SCENARIOS: dict[str, Callable[[int, str, Trainer], None]] = {
    one.__name__: one
    for one in (
        in_background,
        every_third_in_bfloat16,
        without_collectives,
        one_engine_down,
        all_ranks_raise,
        all_ranks_raise_later,
        accumulated_and_skipped,
    )
}


def quick() -> Any:
    from headrace.config import Deadlines, UpdateSettings

    return UpdateSettings(deadlines=Deadlines(ready_s=0.2))


def play(rank: int, world_size: int, port: int, url: str, folder: Path) -> dict[str, str]:
    """Run all scenarios, each with a new trainer; returns what went wrong, by scenario."""
    join(rank, world_size, port)
    found = {}
    for name, scenario in SCENARIOS.items():
        torch.manual_seed(5)
        try:
            scenario(rank, url, LAYOUTS["fsdp2"](folder))
            dist.barrier()
        except BaseException:  # noqa: BLE001 - told to the test
            found[name] = f"rank {rank}: {traceback.format_exc()}"
            break  # the ranks are not at the same place any more
        found[name] = ""
    return found


@pytest.fixture(scope="module")
def played(engine: EngineProcess, folder: Path) -> list[dict[str, str]]:
    return run_ranks(play, 2, 150, free_port(), engine.url, folder)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios(played: list[dict[str, str]], name: str) -> None:
    assert [found.get(name, "did not run") for found in played] == ["", ""]


def lose_an_engine(rank: int, _world_size: int, port: int, folder: Path) -> None:
    """Kill the engine between two steps, train on, start it again: the next step catches up."""
    trainer, reports = LAYOUTS["plain"](folder), []
    target = f"torch=http://127.0.0.1:{port}"
    choices = {"mode": "wait", "report": reports.append, "update": quick()}
    engine = EngineProcess(folder, 1, "--dtype", "float32", port=port)
    try:
        with plain.attach(trainer.model, trainer.optimizer, to=target, **choices):
            trainer.step(batch(1, rank))
            engine.process.kill()
            engine.process.wait()
            trainer.step(batch(2, rank))
            engine = EngineProcess(folder, 1, "--dtype", "float32", port=port)
            trainer.step(batch(3, rank))
            assert compare(engine.url, trainer.whole(), FLOAT, FLOAT) == []
        assert [report.step for report in reports] == [1, None, 3]
        assert reports[1].failures
    finally:
        engine.close()


@pytest.mark.timeout(150)
def test_an_engine_that_was_killed_catches_up(folder: Path) -> None:
    run_ranks(lose_an_engine, 1, 120, free_port(), folder)


def die(rank: int, world_size: int, port: int, url: str, folder: Path) -> None:
    join(rank, world_size, port)
    trainer = LAYOUTS["fsdp2"](folder)
    fsdp.attach(trainer.model, trainer.optimizer, to=f"torch={url}", mode="wait", on_error="raise")
    for step in range(1, 3):
        trainer.step(batch(step, rank))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.step(batch(3, rank))


@pytest.mark.timeout(150)
def test_engines_serve_the_last_version_of_a_killed_trainer(engine: EngineProcess, folder: Path) -> None:
    before = engine.status()["weight_version"] or 0
    with pytest.raises(RankError, match="rank [01]"):
        run_ranks(die, 2, 100, free_port(), engine.url, folder)
    assert engine.status()["weight_version"] == before + 2
    with Stream(engine.url, 20) as stream:
        stream.wait_tokens(5)
    assert set(stream.versions[:5]) == {before + 2}


def compiled(rank: int, _world_size: int, url: str, folder: Path) -> None:
    trainer = LAYOUTS["plain"](folder)
    trainer.model.model.layers[0].mlp.compile()
    model = torch.compile(trainer.model, backend="eager")
    with plain.attach(model, trainer.optimizer, to=f"torch={url}", mode="wait", on_error="raise"):
        tokens = batch(1, rank)
        model(input_ids=tokens, labels=tokens).loss.backward()
        trainer.optimizer.step()
        assert compare(url, trainer.whole(), FLOAT, FLOAT) == []


@pytest.mark.timeout(150)
def test_a_compiled_model(engine: EngineProcess, folder: Path) -> None:
    run_ranks(compiled, 1, 100, engine.url, folder)


def scaled(rank: int, _world_size: int, url: str, folder: Path) -> None:
    """A gradient scaler skips a step whose gradients are infinite: nothing is published, and the next step is."""
    trainer = LAYOUTS["plain"](folder)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    choices: dict[str, Any] = {"mode": "wait", "on_error": "raise"}
    with plain.attach(trainer.model, trainer.optimizer, to=f"torch={url}", **choices) as hook:
        for factor, steps in ((float("inf"), 0), (1.0, 1)):
            trainer.optimizer.zero_grad()
            tokens = batch(1, rank)
            scaler.scale(trainer.model(input_ids=tokens, labels=tokens).loss * factor).backward()
            scaler.step(trainer.optimizer)
            scaler.update()
            assert hook.step == steps
        assert compare(url, trainer.whole(), FLOAT, FLOAT) == []


@pytest.mark.timeout(150)
def test_a_step_that_a_scaler_skips(engine: EngineProcess, folder: Path) -> None:
    run_ranks(scaled, 1, 100, engine.url, folder)


def tied(rank: int, world_size: int, port: int, url: str, folder: Path) -> None:
    join(rank, world_size, port)
    for name in ("fsdp2", "fsdp1-full-orig"):
        trainer = LAYOUTS[name](folder)
        with fsdp.attach(trainer.model, trainer.optimizer, to=f"torch={url}", mode="wait", on_error="raise"):
            trainer.step(batch(1, rank))
            weights = trainer.whole()
            if rank == 0:
                assert compare(url, weights, FLOAT, FLOAT) == []


@pytest.mark.timeout(200)
def test_tied_weights(tmp_path: Path) -> None:
    folder = make_tiny_qwen3(tmp_path, 8, size=ODD, tie=True)
    with EngineProcess(folder, 1, "--dtype", "float32") as engine:
        run_ranks(tied, 2, 100, free_port(), engine.url, folder)
