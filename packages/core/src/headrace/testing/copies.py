"""Copy tables for tests: written row by row, and what they must do, computed the slow and plain way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace.plan import CopyTable
from headrace.types import DTYPES, dtype_code

SEED = 20_260


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRow:
    """One copy of a table, in words of `CopyTable`; strides in bytes."""

    shape: tuple[int, ...]
    src_strides: tuple[int, ...]
    dst_strides: tuple[int, ...]
    src_base: int = 0
    dst_base: int = 0
    src_block: int = 0
    dst_block: int = 0
    src_dtype: str = "bfloat16"
    dst_dtype: str = "bfloat16"


def table_of(rows: Sequence[CopyRow]) -> CopyTable:
    """Return a copy table of `rows`, dims padded in front."""
    width = max([1, *(len(row.shape) for row in rows)])

    def wide(name: str, fill: int) -> np.ndarray:
        values = [(fill,) * (width - len(row.shape)) + getattr(row, name) for row in rows]
        return np.array(values, np.int64).reshape(len(rows), width)

    def column(name: str, kind: type) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], kind)

    codes = [
        np.array([dtype_code(getattr(row, name)) for row in rows], np.uint8)
        for name in ("src_dtype", "dst_dtype")
    ]
    return CopyTable(
        column("src_block", np.int32), column("src_base", np.int64), wide("src_strides", 0),
        column("dst_block", np.int32), column("dst_base", np.int64), wide("dst_strides", 0),
        wide("shape", 1), *codes,
    )  # fmt: skip


def content(index: int, num_bytes: int) -> torch.Tensor:
    """Return what segment `index` of a test holder holds: finite in every floating dtype."""
    random = np.random.default_rng((SEED, index)).integers(0, 0x3F, num_bytes, np.uint8)
    return torch.from_numpy(random)


def expected(
    copies: CopyTable, sources: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the blocks after the copies, made row by row and element by element position: slow and plain."""
    out = [block.clone().numpy() for block in blocks]
    for row in np.flatnonzero(copies.num_elements).tolist():
        item = [DTYPES[code[row]].itemsize for code in (copies.src_dtype, copies.dst_dtype)]
        where = [np.full(copies.shape[row], base[row]) for base in (copies.src_base, copies.dst_base)]
        for side, strides in enumerate((copies.src_strides, copies.dst_strides)):
            where[side] = where[side] + np.tensordot(strides[row], np.indices(copies.shape[row]), 1)
        raw = sources[copies.src_block[row]].numpy()[where[0][..., None] + np.arange(item[0])]
        kinds = [getattr(torch, DTYPES[code[row]].name) for code in (copies.src_dtype, copies.dst_dtype)]
        cast = (
            torch.from_numpy(np.ascontiguousarray(raw)).view(kinds[0]).to(kinds[1]).view(torch.uint8).numpy()
        )
        out[copies.dst_block[row]][where[1][..., None] + np.arange(item[1])] = cast
    return [torch.from_numpy(block) for block in out]


def random_strides(
    shape: tuple[int, ...], order: np.ndarray, item: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """Return strides without overlap, dims nested in `order`, with gaps now and then."""
    strides, step = [0] * len(shape), item
    for dim in order.tolist():
        strides[dim] = step + int(rng.integers(3)) * item * int(rng.integers(2))
        step = strides[dim] * shape[dim]
    return tuple(strides)


def span_of(shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> int:
    """Return the bytes from the first element's begin to the last one's end."""
    return sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)) + item
