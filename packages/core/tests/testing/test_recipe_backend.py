"""The recipe backend keeps the contract of engines: one rank of one, with vocabulary padding, and with casts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from headrace.protocols import InferenceBackend
from headrace.testing import shapes
from headrace.testing.backend_suite import BackendTests
from headrace.testing.faults import FaultyBackend
from headrace.testing.recipe_backend import RecipeBackend
from headrace.types import ParamTable, WorkerId

SMALL = shapes.ModelShape(
    layers=2, hidden=32, vocab=100, heads=4, kv_heads=2, head_dim=8, intermediate=48, experts=2,
    expert_intermediate=24, dense_layers=1,
)  # fmt: skip


class RecipeBackendTests(BackendTests):
    refuses_whole = True
    params = shapes.params_of(SMALL)

    @classmethod
    def make_checkpoint(cls, folder: Path, seed: int) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {m.name: torch.randn(m.shape, generator=generator).to(getattr(torch, m.dtype)) for m in cls.params}
        save_file(tensors, folder / "model.safetensors")
        return folder

    @classmethod
    def make_backend(cls, checkpoint: Path) -> InferenceBackend:
        recipe = shapes.tp_recipe(cls.params, 1, 0, kv_heads=2)
        return RecipeBackend(recipe, WorkerId("recipe", 0), 1, loaded_from=str(checkpoint))

    @classmethod
    def compute(cls, backend: InferenceBackend) -> torch.Tensor:
        return torch.cat([t.flatten().to(torch.float64) for t in backend.live_tensors().values()])

    @classmethod
    def reported_version(cls, backend: InferenceBackend) -> int | None:
        assert isinstance(backend, RecipeBackend)
        return backend.version


class TestWhole(RecipeBackendTests):
    pass


class TestRankOfTwo(RecipeBackendTests):
    @classmethod
    def make_backend(cls, checkpoint: Path) -> InferenceBackend:
        recipe = shapes.tp_recipe(cls.params, 2, 1, kv_heads=2)
        return RecipeBackend(recipe, WorkerId("recipe", 1), 2, loaded_from=str(checkpoint))


class TestCasting(RecipeBackendTests):
    """A float32 engine loads a bfloat16 checkpoint."""

    @classmethod
    def make_backend(cls, checkpoint: Path) -> InferenceBackend:
        wide = ParamTable(replace(meta, dtype="float32") for meta in cls.params)
        recipe = replace(shapes.tp_recipe(wide, 1, 0, kv_heads=2), sources=cls.params)
        return RecipeBackend(recipe, WorkerId("recipe", 0), 1, loaded_from=str(checkpoint))


class TestFaultyWithoutFaults(RecipeBackendTests):
    """The wrapper by which faults are injected changes nothing by itself."""

    @classmethod
    def make_backend(cls, checkpoint: Path) -> InferenceBackend:
        return FaultyBackend(super().make_backend(checkpoint))

    @classmethod
    def reported_version(cls, backend: InferenceBackend) -> int | None:
        assert isinstance(backend, FaultyBackend)
        return super().reported_version(backend.inner)
