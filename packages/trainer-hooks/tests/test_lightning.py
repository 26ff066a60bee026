"""Lightning, alone and with its strategies for DDP, FSDP 1 and 2, and DeepSpeed, into a real engine."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="trainers and the embedded engine need transformers")
pytest.importorskip("lightning", reason="the session `trainers` of nox installs Lightning")

import torch
from framework_runs import FLOAT, examples
from trainer_world import compare, gathered, join_by_environment, load, optimizer_of

from headrace.testing.engine_process import EngineProcess, free_port
from headrace.testing.ranks import run_ranks


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
            hook = next(found for each in self.trainer.callbacks if (found := getattr(each, "hook", None)))
            assert hook._fence.next_readable == hook.step, "copying ends before the forward"
            return self.model(**rows).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

        def on_train_batch_end(self, _outputs: Any, _rows: Any, number: int) -> None:
            every = gathered(self.trainer.strategy.model)
            whole = {name.removeprefix("model."): t for name, t in every.items() if name.startswith("model.")}
            if number % 2 and self.global_rank == 0:
                found.extend(compare(url, whole, FLOAT, FLOAT))

    return Module()


def strategy_of(name: str) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    if name == "fsdp1":
        return fsdp1_on_cpu()
    if name.startswith("zero"):
        return deepspeed_on_cpu(int(name[-1]))
    return DDPStrategy(find_unused_parameters=True, process_group_backend="gloo") if name == "ddp" else "auto"


def fsdp1_on_cpu() -> Any:
    """Return a subclass of Lightning's FSDP strategy that names the CPU to FSDP1; itself it needs a GPU."""
    from lightning.pytorch.strategies import FSDPStrategy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    class OnCpu(FSDPStrategy):
        def _setup_model(self, model: Any) -> Any:
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)

    return OnCpu(auto_wrap_policy=ModuleWrapPolicy({Qwen3DecoderLayer}), process_group_backend="gloo")


def deepspeed_on_cpu(stage: int) -> Any:
    """Return Lightning's DeepSpeed strategy without its check for GPUs; DeepSpeed itself runs over gloo."""
    from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy

    class OnCpu(DeepSpeedStrategy):
        root_device = torch.device("cpu", 0)  # DeepSpeed is told its index

        def setup_environment(self) -> None:
            ParallelStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return OnCpu(config=config, process_group_backend="gloo")


def train(rank: int, world_size: int, port: int, url: str, folder: Path, out: Path, name: str) -> None:
    warnings.filterwarnings("ignore", module="lightning")
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    from headrace_trainers.lightning import HeadraceCallback

    os.environ["DS_ACCELERATOR"] = "cpu"
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
@pytest.mark.parametrize(
    ("name", "num_ranks"), [("alone", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp1", 2), ("zero2", 2), ("zero3", 2)]
)
def test_lightning(engine: EngineProcess, folder: Path, tmp_path: Path, name: str, num_ranks: int) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the session `trainers` of nox installs DeepSpeed")
    run_ranks(train, num_ranks, 100, free_port(), engine.url, folder, tmp_path, name)
