"""Lightning, alone and with its strategies for DDP and FSDP2, into a real engine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="trainers and the embedded engine need transformers")
pytest.importorskip("lightning", reason="the session `trainers` of nox installs Lightning")

import torch
from framework_runs import FLOAT, examples
from trainer_world import ODD, compare, gathered, join_by_environment, load, optimizer_of

from headrace.testing.engine_process import EngineProcess, free_port
from headrace.testing.ranks import run_ranks
from headrace.testing.tiny_model import make_tiny_qwen3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), 7, size=ODD)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[EngineProcess]:
    with EngineProcess(folder, 1, "--dtype", "float32") as made:
        yield made


def module_of(folder: Path, url: str, found: list[str], *, shard: bool) -> Any:
    """Return a LightningModule that compares every parameter after every second batch, which is a step."""
    import lightning
    from torch.distributed.fsdp import fully_shard

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = load(folder)
            self.unused = torch.nn.Linear(2, 2)

        def configure_model(self) -> None:
            for layer in self.model.model.layers if shard else ():
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            if shard:
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

        def training_step(self, rows: dict[str, torch.Tensor], _number: int) -> torch.Tensor:
            return self.model(**rows).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

        def on_train_batch_end(self, _outputs: Any, _rows: Any, number: int) -> None:
            whole = gathered(self.model)
            if number % 2 and self.global_rank == 0:
                found.extend(compare(url, whole, FLOAT, FLOAT))

    return Module()


def strategy_of(name: str) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return DDPStrategy(find_unused_parameters=True, process_group_backend="gloo") if name == "ddp" else "auto"


def train(rank: int, world_size: int, port: int, url: str, folder: Path, out: Path, name: str) -> None:
    warnings.filterwarnings("ignore", module="lightning")
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    from headrace_trainers.lightning import HeadraceCallback

    if world_size > 1:
        join_by_environment(rank, world_size, port)
    found: list[str] = []
    callback = HeadraceCallback(f"torch={url}", prefix="model.", mode="wait", on_error="raise")
    logger = CSVLogger(str(out), flush_logs_every_n_steps=1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy_of(name),
        max_steps=3,
        callbacks=[callback],
        logger=logger,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
    )
    rows = torch.utils.data.DataLoader(examples(12 * world_size), batch_size=2)
    trainer.fit(module_of(folder, url, found, shard=name == "fsdp2"), rows)
    assert found == []
    assert callback.hook is None
    assert rank or "headrace/version" in (Path(logger.log_dir) / "metrics.csv").read_text()


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("name", "num_ranks"), [("alone", 1), ("ddp", 2), ("fsdp2", 2)])
def test_lightning(engine: EngineProcess, folder: Path, tmp_path: Path, name: str, num_ranks: int) -> None:
    run_ranks(train, num_ranks, 100, free_port(), engine.url, folder, tmp_path, name)
