"""Checks before anything moves: does the source fit the recipe, does the recipe fill every target."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from headrace.errors import ManifestMismatchError
from headrace.recipe import LoadRecipe
from headrace.types import DTYPES, I32, I64, ITEMSIZES, ParamTable

Strided = tuple[int, tuple[int, ...], tuple[int, ...]]


def check_fit(recipe: LoadRecipe, params: ParamTable) -> None:
    """Check that a source with `params` can fill the recipe's targets.

    Names that the recipe does not use are ignored. Floating dtypes may differ between source and target (the
    copy casts); between recorded and offered source nothing may differ.

    Raises:
        ManifestMismatchError: Lists all differences.
    """
    found = [*source_differences(recipe, params), *_dtype_differences(recipe)]
    if found:
        shown = "; ".join(found[:10]) + (f"; and {len(found) - 10} more" if len(found) > 10 else "")
        raise ManifestMismatchError(
            f"the source does not fit the engine's model in {len(found)} places: {shown}. "
            "Publish the checkpoint that the engine's model was built for, or start an engine for this one",
            found,
        )


def source_differences(recipe: LoadRecipe, params: ParamTable) -> list[str]:
    """Return how `params` differs from the sources that the recipe uses, one sentence each."""
    sources = recipe.sources
    if params is sources or params.key == sources.key:
        return []
    ids = sources.ids_in(params)
    found = []
    for i in _used(recipe).tolist():
        wanted = sources[i]
        if ids[i] < 0:
            found.append(f"{wanted.name} is missing")
            continue
        offered = params[int(ids[i])]
        if offered.shape != wanted.shape:
            found.append(f"{wanted.name} has shape {offered.shape}, the engine needs {wanted.shape}")
        if offered.dtype != wanted.dtype:
            found.append(f"{wanted.name} is {offered.dtype}, the engine needs {wanted.dtype}")
    return found


def casts(recipe: LoadRecipe) -> tuple[str, ...]:
    """Return the casts that the recipe makes, like `bfloat16->float32 (311 tensors)`, counted in sources."""
    pairs = _casting_pairs(recipe)
    kinds, counts = np.unique(np.unique(pairs, axis=0)[:, :2], axis=0, return_counts=True)
    return tuple(
        f"{DTYPES[src].name}->{DTYPES[dst].name} ({count} tensor{'s' if count != 1 else ''})"
        for (src, dst), count in zip(kinds.tolist(), counts.tolist(), strict=True)
    )


def uncovered_targets(recipe: LoadRecipe, optional: Collection[str] = ()) -> list[str]:
    """Return the targets that regions and fills do not write wholly, in order; exact.

    Targets that go through the engine's loader (`recipe.opaque_reasons`), are named in `optional`, or have no
    elements are left out.
    """
    block, base, shape, strides = _writes(recipe)
    whole = _tiled(recipe, block, base, shape, strides)
    order = np.argsort(block, kind="stable")
    starts = np.searchsorted(block[order], np.arange(len(recipe.targets) + 1))
    exempt = {*optional, *recipe.opaque_reasons}
    left = []
    for target in np.flatnonzero(~whole).tolist():
        meta = recipe.targets[target]
        if meta.name in exempt or meta.num_elements == 0:
            continue
        rows = order[starts[target] : starts[target + 1]]
        parts = [(int(base[r]), tuple(shape[r].tolist()), tuple(strides[r].tolist())) for r in rows.tolist()]
        if _num_distinct(parts) < meta.num_elements:
            left.append(meta.name)
    return left


def _used(recipe: LoadRecipe) -> I64:
    used = np.zeros(len(recipe.sources), np.bool_)
    used[recipe.regions.param] = True
    used[recipe.opaque] = True
    return np.flatnonzero(used)


def _casting_pairs(recipe: LoadRecipe) -> I64:
    """Return (source dtype, target dtype, source) of each region whose dtypes differ."""
    src = recipe.sources.dtype_codes[recipe.regions.param]
    dst = recipe.targets.dtype_codes[recipe.regions.block]
    rows = np.flatnonzero(src != dst)
    columns = (src[rows], dst[rows], recipe.regions.param[rows])
    return np.stack([column.astype(np.int64) for column in columns], axis=1)


def _dtype_differences(recipe: LoadRecipe) -> list[str]:
    rows = np.flatnonzero(
        recipe.sources.dtype_codes[recipe.regions.param] != recipe.targets.dtype_codes[recipe.regions.block]
    )
    pairs = np.stack([recipe.regions.param[rows], recipe.regions.block[rows]], axis=1)
    found = []
    for source_id, target_id in np.unique(pairs, axis=0).tolist():
        source, target = recipe.sources[source_id], recipe.targets[target_id]
        kinds = {dtype.kind for dtype in DTYPES if dtype.name in (source.dtype, target.dtype)}
        if kinds != {"float"}:
            found.append(f"{source.name} is {source.dtype}, the engine's {target.name} is {target.dtype}")
    return found


def _writes(recipe: LoadRecipe) -> tuple[I32, I64, I64, I64]:
    """Return every write of the recipe as (target, base, shape, strides), in elements, without empty ones."""
    regions, fills = recipe.regions, recipe.fills
    item = ITEMSIZES[recipe.targets.dtype_codes[regions.block]]
    width = max(regions.ndim, fills.shape.shape[1])
    shape = np.concatenate([_padded(regions.shape, width, 1), _padded(fills.shape, width, 1)])
    strides = np.concatenate(
        [_padded(regions.strides // item[:, None], width, 0), _padded(fills.strides, width, 0)]
    )
    base = np.concatenate([regions.base // item, fills.base])
    block = np.concatenate([regions.block, fills.block])
    real = (shape > 0).all(axis=1)
    return block[real], base[real], shape[real], strides[real]


def _padded(array: I64, width: int, value: int) -> I64:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=value)


def _tiled(recipe: LoadRecipe, block: I32, base: I64, shape: I64, strides: I64) -> npt.NDArray[np.bool_]:
    """Return the targets whose writes follow each other apart and add up to the target's elements."""
    targets = recipe.targets
    volume = shape.prod(axis=1)
    total = np.bincount(block, weights=volume, minlength=len(targets))
    order = np.lexsort((base, block))
    block, base, reach = block[order], base[order], ((shape - 1) * strides).sum(axis=1)[order] + 1
    touching = (block[1:] == block[:-1]) & (base[1:] < base[:-1] + reach[:-1])
    whole: npt.NDArray[np.bool_] = total == targets.shapes.prod(axis=1)
    whole[block[1:][touching]] = False
    return whole


def _num_distinct(parts: list[Strided]) -> int:
    """Return how many elements strided writes touch, on a bitmap of the units that they are made of."""
    unit = _common_run(parts)
    spans = [
        base + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) for base, shape, strides in parts
    ]
    seen = np.zeros((max(spans, default=-unit) + unit) // unit, np.bool_)
    for base, shape, strides in parts:
        place = np.array(base // unit)
        for extent, stride in zip(shape, strides, strict=True):
            steps = np.arange(0, extent, unit if stride == 1 else 1) * stride // unit
            place = np.add.outer(place, steps) if extent > 1 else place
        seen[place.ravel()] = True
    return int(np.count_nonzero(seen)) * unit


def _common_run(parts: list[Strided]) -> int:
    """Return the largest run of elements that divides every write, its begin and its steps."""
    unit = 0
    for base, shape, strides in parts:
        runs = [extent for extent, stride in zip(shape, strides, strict=True) if stride == 1 and extent > 1]
        steps = [s for n, s in zip(shape, strides, strict=True) if n > 1 and s != 1]
        unit = int(np.gcd.reduce([unit, base, *(runs[:1] or [1]), *steps]))
    return max(unit, 1)
