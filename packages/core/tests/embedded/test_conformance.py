"""The embedded engine keeps the contracts of engines: its worker in one process, its control over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from headrace.embedded.backend import TorchBackend
from headrace.embedded.control import TorchControl
from headrace.embedded.model import own_memory
from headrace.protocols import EngineControl, InferenceBackend
from headrace.testing.backend_suite import BackendTests
from headrace.testing.control_suite import EngineControlTests
from headrace.testing.engine_process import EngineProcess
from headrace.testing.tiny_model import TINY_MODELS
from headrace.types import WorkerId


class TorchBackendTests(BackendTests):
    refuses_whole = True
    kind = "qwen3"
    tie = False

    @classmethod
    def make_checkpoint(cls, folder: Path, seed: int) -> Path:
        return TINY_MODELS[cls.kind](folder, seed=seed, dtype="bfloat16", tie=cls.tie)

    @classmethod
    def make_backend(cls, checkpoint: Path) -> InferenceBackend:
        transformers_logging.disable_progress_bar()
        cls.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").requires_grad_(False)
        own_memory(cls.model)
        return TorchBackend(cls.model, WorkerId("torch", 0), source=str(checkpoint), version=0)

    @classmethod
    def compute(cls, backend: InferenceBackend) -> torch.Tensor:
        with torch.inference_mode():
            return cls.model(torch.tensor([[5, 6, 7, 8]])).logits.clone()

    @classmethod
    def reported_version(cls, backend: InferenceBackend) -> int | None:
        assert isinstance(backend, TorchBackend)
        return backend.seen.version


class TestQwen3(TorchBackendTests):
    pass


class TestTiedLlama(TorchBackendTests):
    kind = "llama"
    tie = True


class TestMoe(TorchBackendTests):
    kind = "qwen3_moe"


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path]) -> Iterator[EngineProcess]:
    with EngineProcess(checkpoints["qwen3"], tp=2) as engine:
        yield engine


class TestTorchControl(EngineControlTests):
    num_workers = 2

    @pytest.fixture(autouse=True)
    def _engine(self, engine: EngineProcess) -> None:
        self.engine = engine

    def make_control(self) -> EngineControl:
        return TorchControl(self.engine.url)

    def make_unreachable(self) -> EngineControl:
        return TorchControl("http://127.0.0.1:1")

    def is_paused(self) -> bool:
        return bool(self.engine.status()["paused"])
