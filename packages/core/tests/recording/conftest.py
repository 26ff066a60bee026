"""What every recording test does: make sources, load for real, replay a recipe, compare bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from headrace.protocols import Skeleton
from headrace.recipe import LoadRecipe
from headrace.recording import record, skeleton_of
from headrace.types import ParamMeta, ParamTable

sys.path.insert(0, str(Path(__file__).parent))  # for `recording_layers`


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


def values(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return random values; the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    return torch.randint(-100, 100, tuple(shape), generator=generator).to(dtype)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Bench:
    """One module, its loader, and the source it is loaded from."""

    module: nn.Module
    load: Callable[[nn.Module, object], object]
    tensors: dict[str, torch.Tensor]
    options: dict[str, object] = field(default_factory=dict)

    @property
    def table(self) -> ParamTable:
        return ParamTable(
            ParamMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        )

    @property
    def live(self) -> dict[str, torch.Tensor]:
        return dict(self.module.named_parameters())

    def record(self, **options: object) -> LoadRecipe:
        twin = skeleton_of(self.module)
        skeleton = Skeleton(dict(twin.named_parameters()), lambda pairs: self.load(twin, pairs))
        defaults: dict[str, object] = {
            "live": self.live,
            "reload_unit": module_of,
            "optional": lambda _: False,
            "derived": {},
            "can_rederive": False,
        }
        return record(skeleton, self.table, **(defaults | self.options | options))

    def load_really(self) -> dict[str, bytes]:
        with torch.no_grad():
            self.load(self.module, iter(self.tensors.items()))
        return {name: as_bytes(t) for name, t in self.live.items()}

    def replay(self, recipe: LoadRecipe) -> dict[str, bytes]:
        """Write what the recipe says into the live tensors, after spoiling them; returns their bytes."""
        live = self.live
        with torch.no_grad():
            for tensor in live.values():
                tensor.fill_(99)
        replay(recipe, live, self.tensors)
        return {name: as_bytes(t) for name, t in live.items()}

    def check(self, *, opaque: Sequence[str] = ()) -> LoadRecipe:
        """Record, replay and compare with the real loader; everything but `opaque` must be equal."""
        recipe = self.record()
        expected = self.load_really()
        got = self.replay(recipe)
        wrong = [n for n in expected if n not in recipe.opaque_reasons and got[n] != expected[n]]
        assert wrong == []
        assert sorted(recipe.opaque_reasons) == sorted(opaque)
        return recipe


def replay(recipe: LoadRecipe, live: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Execute a recipe in the plainest way; every destination element must be written at most once."""
    written = {m.name: np.zeros(live[m.name].untyped_storage().nbytes(), np.int32) for m in recipe.targets}
    regions, fills = recipe.regions, recipe.fills
    with torch.no_grad():
        for i, box in enumerate(regions.boxes([len(recipe.sources[p].shape) for p in regions.param])):
            source = tensors[recipe.sources[int(regions.param[i])].name]
            name = recipe.targets[int(regions.block[i])].name
            size = live[name].element_size()
            steps = [int(s) // size for s in regions.strides[i, : len(box.shape)]]
            part = source[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))]
            _write(live[name], written[name], box.shape, steps, int(regions.base[i]) // size).copy_(part)
        for i in range(len(fills)):
            name = recipe.targets[int(fills.block[i])].name
            shape, steps = fills.shape[i].tolist(), fills.strides[i].tolist()
            _write(live[name], written[name], shape, steps, int(fills.base[i])).fill_(float(fills.value[i]))
    assert all(count.max(initial=0) <= 1 for count in written.values())


def _write(
    tensor: torch.Tensor, written: np.ndarray, shape: Sequence[int], steps: Sequence[int], base: int
) -> torch.Tensor:
    count = torch.from_numpy(written)[: written.size // tensor.element_size()]
    count.as_strided(shape, steps, base).add_(1)
    return tensor.as_strided(shape, steps, tensor.storage_offset() + base)


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    """Return a maker of benches: `(module, load, {name: shape or tensor}, dtype)`."""

    def make(
        module: nn.Module,
        load: Callable[[nn.Module, object], object],
        shapes: Mapping[str, Sequence[int] | torch.Tensor],
        dtype: torch.dtype = torch.bfloat16,
        **options: object,
    ) -> Bench:
        tensors = {
            name: shape if isinstance(shape, torch.Tensor) else values(shape, dtype, seed)
            for seed, (name, shape) in enumerate(shapes.items())
        }
        return Bench(module, load, tensors, options)

    return make
