"""The models of the benchmarks: shapes only; bytes come from a seed. Workers are made from the same description."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch

from headrace.protocols import InferenceBackend
from headrace.recipe import LoadRecipe
from headrace.testing.recipe_backend import RecipeBackend
from headrace.testing.shapes import QWEN3_06B, QWEN3_8B, QWEN3_30B_A3B, ModelShape, params_of, tp_recipe
from headrace.types import ParamMeta, ParamTable, WorkerId

NUM_WORKERS = 2
_MATRIX_COLUMNS = 1024


@dataclass(frozen=True)
class Model:
    """A model by its shape, or as equal matrices of `num_bytes` together; workers cut every other one by columns."""

    name: str
    shape: ModelShape | None = None
    num_matrices: int = 0
    num_bytes: int = 0

    def params(self) -> ParamTable:
        """Return its checkpoint parameters."""
        if self.shape is None:
            return ParamTable(self._matrix(i) for i in range(self.num_matrices))
        return ParamTable(
            m for m in params_of(self.shape) if not (self.shape.tied and m.name == "lm_head.weight")
        )

    def recipe(self, world_size: int, rank: int) -> LoadRecipe:
        """Return what a tensor-parallel engine's loader does with it."""
        kv_heads = self.shape.kv_heads if self.shape else 0
        return tp_recipe(
            self.params(), world_size, rank, kv_heads=kv_heads, tied=bool(self.shape and self.shape.tied)
        )

    def _matrix(self, index: int) -> ParamMeta:
        module = "down_proj" if index % 2 else "up_proj"
        rows = self.num_bytes // self.num_matrices // _MATRIX_COLUMNS // 2 // NUM_WORKERS * NUM_WORKERS
        return ParamMeta(
            f"model.layers.{index // 2}.mlp.{module}.weight", "bfloat16", (rows, _MATRIX_COLUMNS)
        )


DENSE = Model("Qwen3-0.6B", QWEN3_06B)
MOE = Model("mixture of experts", replace(
    QWEN3_06B, layers=12, hidden=512, kv_heads=4, heads=8, head_dim=64, tied=False, experts=128, expert_intermediate=192
))  # fmt: skip
TINY = Model("one tiny tensor", num_matrices=2, num_bytes=16384)
SERVED = {
    "dense": Model("Qwen3-8B", QWEN3_8B),
    "experts": Model("Qwen3 with 12 layers of 128 experts", replace(QWEN3_30B_A3B, layers=12)),
    "tiny": Model(
        "tiny Qwen3",
        ModelShape(layers=2, hidden=256, vocab=1024, heads=4, kv_heads=2, head_dim=64, intermediate=512),
    ),
}
"""What a real engine serves, by the names of `benchmarks.vllm_gpu`."""


def qwen3_options(layers: int = QWEN3_06B.layers) -> dict[str, object]:
    """Return the options of transformers' configuration of Qwen3-0.6B, with so many layers."""
    shape = QWEN3_06B
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": True,
    }


def grown(num_matrices: int) -> Model:
    """Return 1.2 GB as so many matrices."""
    return Model(f"{num_matrices:,} matrices", num_matrices=num_matrices, num_bytes=1_200_000_000)


def worker_backend(worker: WorkerId, world_size: int, model: Model, budget_bytes: int) -> RecipeBackend:
    """Make a worker of an engine that serves `model`."""
    return RecipeBackend(model.recipe(world_size, worker.rank), worker, world_size, budget_bytes=budget_bytes)


def make_tensors(model: Model, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return a source's tensors with random bits."""
    make = torch.Generator().manual_seed(seed)
    return {
        m.name: torch.randint(-(2**15), 2**15, m.shape, dtype=torch.int16, generator=make).view(
            torch.bfloat16
        )
        for m in model.params()
    }


def change(tensors: dict[str, torch.Tensor]) -> None:
    """Make a new version: a row of every tensor gets other bits."""
    for tensor in tensors.values():
        tensor[0].view(torch.int16).add_(1)


def checksum(backend: InferenceBackend, _receiver: object = None) -> int:
    """Return a checksum of all live bytes; for `BareEngine.call`."""
    total = 0
    for tensor in backend.live_tensors().values():
        total = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, total)
    return total


def expected_checksum(model: Model, rank: int, tensors: dict[str, torch.Tensor]) -> int:
    """Return the checksum that a worker must have, by way of a loader in this process."""
    backend = worker_backend(WorkerId("expected", rank), NUM_WORKERS, model, 0)
    backend.load(tensors.items())
    return checksum(backend)
