"""The core's own sources keep the contract of sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from headrace.protocols import WeightSource
from headrace.store.checkpoint import CheckpointSource
from headrace.store.tensors import TensorSource
from headrace.testing.source_suite import SourceTests


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "wide": torch.randn(37, 11, generator=generator).to(torch.bfloat16),
        "deep": torch.randn(3, 4, 5, generator=generator),
        "flat": torch.arange(97, dtype=torch.int64),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "small": torch.randn(8, 8, generator=generator).to(torch.float8_e4m3fn),
        "flags": torch.rand(9, generator=generator) > 0.5,
    }


class TestCheckpoint(SourceTests):
    num_parts = 1

    def make_sources(self, folder: Path) -> tuple[Sequence[WeightSource], Mapping[str, torch.Tensor]]:
        tensors = make_tensors()
        names = list(tensors)
        for i in range(3):
            save_file({name: tensors[name] for name in names[i::3]}, folder / f"part-{i}.safetensors")
        return [CheckpointSource(folder, parts=self.num_parts, part=i) for i in range(self.num_parts)], tensors


class TestSharedCheckpoint(TestCheckpoint):
    num_parts = 4


class TestTensors(SourceTests):
    def make_sources(self, folder: Path) -> tuple[Sequence[WeightSource], Mapping[str, torch.Tensor]]:
        tensors = make_tensors()
        tensors["transposed"] = torch.arange(60).view(6, 10).t()
        tensors["strided"] = torch.arange(60, dtype=torch.float32)[::3]
        tensors["parameter"] = torch.nn.Parameter(torch.ones(4, 3))
        return [TensorSource(tensors)], tensors
