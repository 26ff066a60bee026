"""A world for fault tests: a bare engine whose live weights are known to the byte, and checkpoints made from seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from headrace.errors import HeadraceError
from headrace.recipe import LoadRecipe
from headrace.server.parameter_server import ParameterServer
from headrace.testing import shapes
from headrace.testing.bare_engine import BareEngine, served_version, weights_state
from headrace.testing.faults import Fault, FaultyBackend, FaultyTransport, arm
from headrace.testing.leaks import snapshot
from headrace.testing.recipe_backend import RecipeBackend
from headrace.transports.tcp import TcpTransport
from headrace.types import ITEMSIZES, ParamTable, WorkerId

SHAPE = shapes.ModelShape(layers=2, hidden=48, vocab=250, heads=6, kv_heads=6, head_dim=8, intermediate=96)
PARAMS = shapes.params_of(SHAPE)
MOST_SEGMENTS = 2 * 3
"""Two updates, of three holders each, one segment per holder."""

MakeWorld = Callable[..., "World"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How workers keep their weights.

    Attributes:
        dtype: Element type of live tensors; checkpoints are bfloat16.
        transposed: Projections lie column by column.
        padding: Elements between the rows of live matrices.
        budget_bytes: Staging memory that a worker offers.
        loaded_seed: Weights that workers start with; None for a dummy start.
    """

    dtype: str = "bfloat16"
    transposed: bool = False
    padding: int = 0
    budget_bytes: int = 1 << 30
    loaded_seed: int | None = 1


class StridedBackend(RecipeBackend):
    """Its live tensors have gaps between their rows."""

    def __init__(
        self, recipe: LoadRecipe, worker: WorkerId, world_size: int, layout: Layout, folder: str | None
    ) -> None:
        self._padding = layout.padding
        super().__init__(recipe, worker, world_size, budget_bytes=layout.budget_bytes, loaded_from=folder)

    def _make_live(self, recipe: LoadRecipe) -> dict[str, torch.Tensor]:
        return {m.name: self._padded(m.shape, getattr(torch, m.dtype)) for m in recipe.targets}

    def _padded(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        width = shape[-1] + (self._padding if len(shape) > 1 else 0)
        whole = torch.zeros((*shape[:-1], width), dtype=dtype)
        return whole[..., : shape[-1]]


def recipe_of(layout: Layout, world_size: int, rank: int) -> LoadRecipe:
    """Return what a worker's loader does in this layout."""
    wide = ParamTable(replace(meta, dtype=layout.dtype) for meta in PARAMS)
    recipe = shapes.tp_recipe(wide, world_size, rank, kv_heads=SHAPE.kv_heads)
    recipe = replace(recipe, sources=PARAMS, proven=False)
    return _padded(_transposed(recipe) if layout.transposed else recipe, layout.padding)


def _padded(recipe: LoadRecipe, padding: int) -> LoadRecipe:
    """Widen the rows of every matrix."""
    regions, fills, targets = recipe.regions, recipe.fills, recipe.targets
    item = ITEMSIZES[targets.dtype_codes]
    width = targets.shapes[:, 1] * (targets.shapes[:, 1] > 1)

    def widened(offsets: np.ndarray, block: np.ndarray, unit: np.ndarray) -> np.ndarray:
        rows = np.where(width[block] > 0, offsets // np.maximum(width[block] * unit, 1), 0)
        return offsets + rows * padding * unit

    unit = item[regions.block]
    strides = regions.strides.copy()
    for dim in range(strides.shape[1]):
        strides[:, dim] = widened(strides[:, dim], regions.block, unit)
    one = np.ones_like(fills.base)
    fill_strides = fills.strides.copy()
    fill_strides[:, 0] = widened(fill_strides[:, 0], fills.block, one)
    return replace(
        recipe,
        regions=replace(regions, base=widened(regions.base, regions.block, unit), strides=strides),
        fills=replace(fills, base=widened(fills.base, fills.block, one), strides=fill_strides),
    )


def _transposed(recipe: LoadRecipe) -> LoadRecipe:
    """Let every fused projection lie column by column, as kernels that want `x @ w` have it."""
    regions, metas = recipe.regions, list(recipe.targets)
    base, strides = regions.base.copy(), regions.strides.copy()
    for block, meta in enumerate(metas):
        if "gate_up" not in meta.name and "o_proj" not in meta.name:
            continue
        rows, columns = meta.shape
        item = ITEMSIZES[recipe.targets.dtype_codes[block]]
        metas[block] = replace(meta, shape=(columns, rows))
        mine = regions.block == block
        first = base[mine] // (columns * item)
        base[mine] = first * item
        strides[mine, 0], strides[mine, 1] = item, rows * item
    return replace(recipe, targets=ParamTable(metas), regions=replace(regions, base=base, strides=strides))


def make_worker(worker: WorkerId, world_size: int, layout: Layout, folder: str | None) -> FaultyBackend:
    """Make a worker's backend; a factory for BareEngine."""
    recipe = recipe_of(layout, world_size, worker.rank)
    return FaultyBackend(StridedBackend(recipe, worker, world_size, layout, folder))


def make_tensors(seed: int, params: ParamTable = PARAMS) -> dict[str, torch.Tensor]:
    """Return random weights of any bit pattern that is a number."""
    generator = torch.Generator().manual_seed(seed)
    return {meta.name: _random_bits(meta.shape, generator) for meta in params}


def _random_bits(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return finite numbers of either sign below two."""
    magnitude = torch.randint(0, 0x4000, shape, generator=generator, dtype=torch.int32)
    sign = torch.randint(0, 2, shape, generator=generator, dtype=torch.int32) << 15
    return (magnitude | sign).to(torch.int16).view(torch.bfloat16)


def make_checkpoint(folder: Path, seed: int, num_files: int = 2) -> Path:
    """Write weights of a seed as a checkpoint of several files and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_checkpoint(folder, make_tensors(seed), num_files)


def write_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], num_files: int = 2) -> Path:
    """Write tensors as a checkpoint of several files and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    for part in range(num_files):
        file = folder / f"model-{part + 1:05}-of-{num_files:05}.safetensors"
        save_file({name: tensors[name].clone() for name in names[part::num_files]}, file)
    return folder


def live_sums(backend: Any, _receiver: Any) -> dict[str, str]:
    """Return sha256 of each live tensor; for `BareEngine.call`."""
    return {name: _sum(tensor) for name, tensor in backend.live_tensors().items()}


def _sum(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()


def expected_sums(seed: int | None, layout: Layout, world_size: int, rank: int) -> dict[str, str]:
    """Return what `live_sums` must be on a rank that holds the weights of `seed`, or none yet."""
    worker = WorkerId("expected", rank)
    backend = StridedBackend(recipe_of(layout, world_size, rank), worker, world_size, layout, None)
    if seed is not None:
        backend.load(make_tensors(seed).items())
    return live_sums(backend, None)


class World:
    """A bare engine, the weights that it must hold, and parameter servers for it.

    Attributes:
        engine: The engine; its `control` is what updates go to.
        seed: Weights that must be live now.
        version: Version that must be reported now.
        holds: Whether updates go to the control that can hold.
    """

    def __init__(self, folder: Path, *, workers: int = 2, **layout: Any) -> None:
        self.folder = folder
        self.layout = Layout(**layout)
        self.workers = workers
        self.holds = False
        self.seed = self.layout.loaded_seed
        self.version: int | None = None if self.seed is None else 0
        start = None if self.seed is None else str(self.checkpoint(self.seed))
        self.engine = BareEngine(make_worker, workers, self.layout, start)
        self._servers: list[ParameterServer] = []

    @property
    def control(self) -> Any:
        """The engine's control."""
        return self.engine.holding if self.holds else self.engine.control

    def checkpoint(self, seed: int) -> Path:
        """Return the folder of a seed's checkpoint, made once."""
        folder = self.folder / f"seed-{seed}"
        return folder if folder.exists() else make_checkpoint(folder, seed)

    def server(self, seed: int | None = None, **options: Any) -> ParameterServer:
        """Return a parameter server over a seed's checkpoint, or over what `options` say; closed with the world."""
        options = options if seed is None else options | {"checkpoint": self.checkpoint(seed)}
        server = ParameterServer(**options)
        self._servers.append(server)
        return server

    def arm(self, rank: int, *faults: Fault) -> None:
        """Let a worker's backend fail."""
        self.engine.call(rank, arm, *faults)

    def trainer(self, seed: int, **options: Any) -> ParameterServer:
        """Return a parameter server over a seed's tensors in this process; it needs no holder process."""
        return self.server(tensors=make_tensors(seed), **options)

    def begin(self) -> None:
        """Check that the world is whole before a test."""
        self.check()
        self.engine.pauses = 0

    def end(self) -> None:
        """Close a test's servers, disarm its faults, and check that a good update succeeds."""
        for rank in range(self.workers):
            self.arm(rank)
        self.close_servers()
        self.heals()
        self.close_servers()

    def update(self, server: ParameterServer, seed: int, **choices: Any) -> Any:
        """Make an update that must succeed, and check that the engine then serves `seed`."""
        report = server.update(self.control, **choices)
        assert report.version > (self.version or 0)
        self.seed, self.version = seed, report.version
        self.check()
        return report

    def fails(self, server: ParameterServer, **choices: Any) -> HeadraceError:
        """Make an update that must fail, and return its error."""
        try:
            report = server.update(self.control, **choices)
        except HeadraceError as error:
            return error
        message = f"the update to version {report.version} succeeded"
        raise AssertionError(message)

    def check(self, *, paused: bool = False) -> None:
        """Check that every rank holds and reports what it must, and that the engine runs."""
        assert self.engine.paused is paused
        assert self.engine.call_all(served_version) == [self.version] * self.workers
        assert self.engine.call_all(weights_state) == ["old"] * self.workers
        for rank, found in enumerate(self.engine.call_all(live_sums)):
            wanted = expected_sums(self.seed, self.layout, self.workers, rank)
            assert [name for name in wanted if found[name] != wanted[name]] == []

    def heals(self, seed: int = 77, **choices: Any) -> None:
        """Check that a good update by a new server succeeds, and that workers keep segments of two updates at most."""
        self.update(self.trainer(seed), seed, **choices)
        kept = snapshot(self.engine.pids).memfds
        assert max(kept[pid] for pid in self.engine.pids) <= MOST_SEGMENTS

    def close_servers(self) -> None:
        """Close all servers made so far."""
        for server in self._servers:
            server.close()
        self._servers = []

    def close(self) -> None:
        """Close servers and engine."""
        self.close_servers()
        self.engine.close()


def slow_tcp(_backend: Any, receiver: Any, seconds: float) -> None:
    """Let a worker's next read over TCP take some time; for `BareEngine.call`."""
    slow = Fault(point="wait", action="delay", seconds=seconds)
    receiver._transports["tcp"] = FaultyTransport(TcpTransport(), slow)


def faulty_tcp(_backend: Any, receiver: Any, *faults: Fault) -> None:
    """Let a worker's reads over TCP fail; without faults all is well again."""
    receiver._transports["tcp"] = FaultyTransport(TcpTransport(), *faults)
