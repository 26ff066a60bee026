"""Which boxes each side sums up so that holders and receivers can compare their digests."""

from __future__ import annotations

import numpy as np

from headrace.geometry import RegionTable
from headrace.plan import DigestTable
from headrace.planner.join import all_dims, fit_width
from headrace.recipe import LoadRecipe
from headrace.types import I32, I64, ITEMSIZES, U8, ParamTable


def needs_of(recipe: LoadRecipe) -> RegionTable:
    """Return what a recipe needs, empty boxes left out: its regions, then every opaque source whole.

    Opaque source `i` lies dense and row-major in block `len(recipe.targets) + i`.
    """
    sources, opaque = recipe.sources, recipe.opaque
    shape = sources.shapes[opaque]
    inner = np.ones_like(shape)
    inner[:, :-1] = np.cumprod(shape[:, :0:-1], axis=1)[:, ::-1]
    strides = inner * ITEMSIZES[sources.dtype_codes[opaque]][:, None]
    block = np.arange(len(opaque), dtype=np.int32) + np.int32(len(recipe.targets))
    whole = RegionTable(
        opaque.astype(np.int32), np.zeros_like(shape), shape, block, np.zeros(len(opaque), np.int64), strides
    )
    table = RegionTable.concat([fit_width(recipe.regions, sources.max_ndim), whole])
    real = all_dims(table.shape > 0)
    return table if real.all() else table.take(real)


def needed_dtypes(recipe: LoadRecipe, needs: RegionTable) -> U8:
    """Return the dtype code in which each need is stored: its target's, or the source's for opaque ones."""
    opaque = needs.block >= len(recipe.targets)
    codes = np.append(recipe.targets.dtype_codes, np.uint8(0))
    target = np.where(opaque, len(recipe.targets), needs.block)
    out = np.where(opaque, recipe.sources.dtype_codes[needs.param], codes[target])
    return out.astype(np.uint8)


def receiver_digests(recipe: LoadRecipe) -> DigestTable:
    """Return the boxes that a receiver sums up in its own memory, to be compared group by group.

    `block` and `group` are the target's id; opaque buffer `i` is block and group `len(recipe.targets) + i`.
    """
    needs = needs_of(recipe)
    dtype = needed_dtypes(recipe, needs)
    return digest_table(needs, recipe.sources, param_ndims(recipe.sources), dtype, dtype, needs.block)


def digest_table(
    placed: RegionTable, params: ParamTable, ndims: U8, src_dtype: U8, dst_dtype: U8, group: I32
) -> DigestTable:
    """Return the digest rows of placed boxes of `params`."""
    return DigestTable(
        offsets=placed.offsets,
        shape=placed.shape,
        extents=params.shapes[placed.param],
        ndim=ndims[placed.param],
        block=placed.block,
        base=placed.base,
        strides=placed.strides,
        src_dtype=src_dtype,
        dst_dtype=dst_dtype,
        group=group,
    )


def digests_by_holder(table: DigestTable, holder: I32, segment_start: I64) -> dict[int, DigestTable]:
    """Split rows by holder and count their blocks in that holder's own segments."""
    found = {}
    for number in np.unique(holder).tolist():
        rows = np.flatnonzero(holder == number)
        part = slice(None) if len(rows) == len(holder) else rows
        found[number] = DigestTable(
            offsets=table.offsets[part],
            shape=table.shape[part],
            extents=table.extents[part],
            ndim=table.ndim[part],
            block=table.block[part] - np.int32(segment_start[number]),
            base=table.base[part],
            strides=table.strides[part],
            src_dtype=table.src_dtype[part],
            dst_dtype=table.dst_dtype[part],
            group=table.group[part],
        )
    return found


def param_ndims(params: ParamTable) -> U8:
    """Return the real number of dims per parameter, shape (len(params),)."""
    return np.fromiter((len(meta.shape) for meta in params), np.uint8, len(params))
