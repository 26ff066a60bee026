"""RecipeBackend: an engine worker without a model, whose loader does what a given recipe says; for benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from headrace.errors import ApplyError
from headrace.protocols import NamedTensors, Skeleton, WorkerIdentity
from headrace.receiver.blocks import write_fills
from headrace.recipe import LoadRecipe
from headrace.recording import whole_tensors
from headrace.segments.cuda import uuid_of
from headrace.store.checkpoint import CheckpointSource
from headrace.types import ITEMSIZES, WorkerId


class RecipeBackend:
    """Implements InferenceBackend over plain tensors of the recipe's targets.

    Args:
        recipe: What the loader does; made by hand (`headrace.testing.shapes`).
        worker: Who this worker is.
        world_size: Workers of the instance.
        budget_bytes: What it says is free for staging.
        loaded_from: Checkpoint folder to load at the start; None leaves zeros, as after a dummy start.
        device: Where its tensors lie, as torch names it.
    """

    def __init__(
        self,
        recipe: LoadRecipe,
        worker: WorkerId,
        world_size: int,
        *,
        budget_bytes: int = 4 << 30,
        loaded_from: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.recipe = recipe
        uuid = _device_uuid(torch.device(device), worker)
        self._identity = WorkerIdentity(worker, world_size, device, uuid, f"recipe {recipe.key}")
        self._live = self._make_live(recipe)
        self._budget_bytes = budget_bytes
        self._loaded_from = loaded_from
        self.version: int | None = None
        self.commits = 0
        if loaded_from is not None:
            self._load_checkpoint(loaded_from)

    def identity(self) -> WorkerIdentity:
        """Who this worker is."""
        return self._identity

    def live_tensors(self) -> Mapping[str, torch.Tensor]:
        """The targets' tensors."""
        return self._live

    def skeleton(self) -> Skeleton:
        """The same tensors on the meta device, with their strides, and the same loader."""
        meta = {
            name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            for name, tensor in self._live.items()
        }
        recipe = self.recipe
        return Skeleton(meta, lambda pairs: write_recipe(recipe, meta, pairs))

    def loaded_from(self) -> str | None:
        """The folder given at the start."""
        return self._loaded_from

    def load(self, pairs: NamedTensors) -> None:
        """Copy every source's regions to where the recipe says."""
        with torch.no_grad():
            write_recipe(self.recipe, self._live, pairs)

    def begin_reload(self) -> None:
        """Nothing: weights keep their loader's layout."""

    def end_reload(self) -> None:
        """Nothing: weights keep their loader's layout."""

    def reload_unit(self, name: str) -> str:
        """Each tensor is its own unit."""
        return name

    def optional(self, name: str) -> bool:  # noqa: ARG002 - the contract's signature
        """No tensor may be left out."""
        return False

    def derived(self) -> Mapping[str, Sequence[str]]:
        """Nothing is derived."""
        return {}

    def rederive(self, names: Sequence[str]) -> bool:  # noqa: ARG002 - the contract's signature
        """Nothing is derived."""
        return True

    def free_memory_bytes(self) -> int:
        """The budget given."""
        return self._budget_bytes

    @contextmanager
    def commit_scope(self) -> Iterator[None]:
        """Count commits; there are no forward steps to order against."""
        self.commits += 1
        yield

    def set_version(self, version: int) -> None:
        """Note the version."""
        self.version = version

    def _make_live(self, recipe: LoadRecipe) -> dict[str, torch.Tensor]:
        device = self._identity.device
        return {m.name: torch.zeros(m.shape, dtype=getattr(torch, m.dtype), device=device) for m in recipe.targets}

    def _load_checkpoint(self, folder: str) -> None:
        source = CheckpointSource(folder)
        try:
            read = whole_tensors(source)
            self.load((meta.name, read(meta.name)) for meta in source.metadata())
        finally:
            source.close()


def _device_uuid(device: torch.device, worker: WorkerId) -> str:
    """Return which GPU this is; on a CPU every worker has a device of its own."""
    if device.type == "cuda":
        return uuid_of(device)
    return f"{device}-{worker.rank}"


def write_recipe(recipe: LoadRecipe, live: Mapping[str, torch.Tensor], pairs: NamedTensors) -> None:
    """Do in the plainest way what a recipe says: copy every source's regions into `live`, write the fills."""
    regions, item = recipe.regions, ITEMSIZES[recipe.targets.dtype_codes]
    for name, source in pairs:
        index = recipe.sources.index_of(name)
        if index is None:
            continue
        if tuple(source.shape) != recipe.sources[index].shape:
            message = f"{name} has shape {tuple(source.shape)}, the engine needs {recipe.sources[index].shape}"
            raise ApplyError(message, name=name, phase="load")
        for row in np.flatnonzero(regions.param == index):
            block = int(regions.block[row])
            part = source
            for dim in range(source.dim()):
                part = part.narrow(dim, int(regions.offsets[row, dim]), int(regions.shape[row, dim]))
            strides = (regions.strides[row, : source.dim()] // item[block]).tolist()
            target = live[recipe.targets[block].name]
            base = target.storage_offset() + int(regions.base[row] // item[block])
            target.as_strided(part.shape, strides, base).copy_(part)
    write_fills(recipe.fills, [live[meta.name] for meta in recipe.targets])
