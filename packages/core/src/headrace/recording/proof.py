"""Compares a recipe with weights that the engine itself loaded; what differs is the loader's again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from headrace.errors import IntegrityError
from headrace.geometry import Box
from headrace.protocols import SourceRegion, WeightSource
from headrace.recipe import LoadRecipe
from headrace.recording.spread import spread
from headrace.types import ITEMSIZES, ParamTable

logger = logging.getLogger(__name__)

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def whole_tensors(source: WeightSource) -> Callable[[str], torch.Tensor]:
    """Return a function that reads whole parameters of a source that holds them whole (a checkpoint)."""
    metas = source.metadata()

    def read(name: str) -> torch.Tensor:
        index = metas.index_of(name)
        if index is None:
            raise IntegrityError(f"{name} is recorded and not in the source", phase="prove", name=name)
        meta = metas[index]
        buffer = torch.empty(meta.num_bytes, dtype=torch.uint8)
        source.read(SourceRegion(name, Box.whole(meta.shape)), memoryview(buffer.numpy().data))
        return buffer.view(getattr(torch, meta.dtype)).view(meta.shape)

    return read


def prove(
    recipe: LoadRecipe,
    live: Mapping[str, torch.Tensor],
    tensor_of: Callable[[str], torch.Tensor],
    *,
    reload_unit: Callable[[str], str],
) -> LoadRecipe:
    """Compare every recorded destination with its source, bit for bit, and return the recipe as proven.

    In the worker, no collective; reads live tensors, writes nothing. Needs weights in place that the engine's
    own loader put there from the same source. NaN payloads count.

    Args:
        recipe: As recorded.
        live: The engine's live tensors.
        tensor_of: Returns a whole source tensor by name, on any device; called once per source, in table
            order, and dropped after use. `whole_tensors` makes one from a checkpoint.
        reload_unit: Unit that a target is reloaded with.

    Returns:
        The recipe with `proven=True`; targets that differ are opaque with everything they are reloaded with.

    Raises:
        IntegrityError: A source tensor does not have the recorded shape.
    """
    blocks = [live.get(meta.name) for meta in recipe.targets]
    wrong: dict[int, str] = {}
    order = np.argsort(recipe.regions.param, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(recipe.regions.param[order])) + 1):
        if len(rows):
            meta = recipe.sources[int(recipe.regions.param[rows[0]])]
            tensor = tensor_of(meta.name)
            if tuple(tensor.shape) != meta.shape:
                message = f"{meta.name} was recorded as {meta.shape} and is {tuple(tensor.shape)}"
                raise IntegrityError(message, phase="prove", name=meta.name)
            _compare_source(recipe, rows, tensor, blocks, wrong)
    _compare_fills(recipe, blocks, wrong)
    reasons = {recipe.targets[block].name: why for block, why in wrong.items()}
    if reasons:
        some = ", ".join(sorted(reasons)[:5])
        logger.info("%d of %d targets differ from their recipe: %s", len(reasons), len(blocks), some)
    return without(recipe, reasons, reload_unit)


def without(recipe: LoadRecipe, reasons: Mapping[str, str], reload_unit: Callable[[str], str]) -> LoadRecipe:
    """Return a proven recipe in which these targets, and all that is reloaded with them, are opaque."""
    names = [meta.name for meta in recipe.targets]
    feeds: dict[str, set[int]] = {name: set() for name in names}
    for param, block in zip(recipe.regions.param.tolist(), recipe.regions.block.tolist(), strict=True):
        feeds[names[block]].add(param)
    sources = dict.fromkeys(recipe.opaque.tolist(), "a source goes through the loader")
    opaque = spread(feeds, recipe.opaque_reasons | dict(reasons), sources, reload_unit)
    gone = np.array([name in opaque.reasons for name in names], bool)
    keep_region, keep_fill = ~gone[recipe.regions.block], ~gone[recipe.fills.block]
    fills = recipe.fills
    return replace(
        recipe,
        regions=recipe.regions.take(keep_region),
        fills=replace(
            fills,
            block=fills.block[keep_fill],
            base=fills.base[keep_fill],
            shape=fills.shape[keep_fill],
            strides=fills.strides[keep_fill],
            value=fills.value[keep_fill],
        ),
        opaque=np.array(sorted(opaque.sources), np.int32),
        opaque_reasons=opaque.reasons,
        proven=True,
    )


def _compare_source(
    recipe: LoadRecipe,
    rows: np.ndarray,
    tensor: torch.Tensor,
    blocks: list[torch.Tensor | None],
    wrong: dict[int, str],
) -> None:
    regions, rank = recipe.regions, tensor.dim()
    for row in rows.tolist():
        block, base = int(regions.block[row]), int(regions.base[row])
        offsets, shape, strides = (c[row].tolist() for c in (regions.offsets, regions.shape, regions.strides))
        if block in wrong:
            continue
        target, size = blocks[block], _itemsize(recipe.targets, block)
        if target is None:
            wrong[block] = "the engine no longer has the tensor"
            continue
        steps = [s // size for s in strides[:rank]]
        there = target.as_strided(shape[:rank], steps, target.storage_offset() + base // size)
        here = tensor[tuple(slice(o, o + n) for o, n in zip(offsets[:rank], shape[:rank], strict=True))]
        if not _same(here, there):
            wrong[block] = "the engine's loaded bytes differ from what was recorded"


def _compare_fills(recipe: LoadRecipe, blocks: list[torch.Tensor | None], wrong: dict[int, str]) -> None:
    fills = recipe.fills
    for row in range(len(fills)):
        block, base, value = int(fills.block[row]), int(fills.base[row]), float(fills.value[row])
        shape, strides = fills.shape[row].tolist(), fills.strides[row].tolist()
        target = blocks[block]
        if target is None:
            wrong[block] = "the engine no longer has the tensor"
            continue
        there = target.as_strided(shape, strides, target.storage_offset() + base)
        if not _same(torch.tensor(value, dtype=target.dtype).expand(shape), there):
            wrong.setdefault(block, f"the engine's loaded bytes differ from the recorded constant {value}")


def _same(here: torch.Tensor, there: torch.Tensor) -> bool:
    cast = here.to(there.dtype).to(there.device)
    bits = _BITS[there.element_size()]
    return torch.equal(cast.view(bits), there.detach().view(bits))


def _itemsize(targets: ParamTable, block: int) -> int:
    return int(ITEMSIZES[targets.dtype_codes[block]])
