"""A copy table bound to memory: views made once, then one batched call per run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace.errors import PlanError
from headrace.plan import CopyTable
from headrace.transports.rows import Mask, Rows
from headrace.types import DTYPES, I64, ITEMSIZES, U8, dtype_code

_TORCH = [getattr(torch, dtype.name) for dtype in DTYPES]
_BITS_CODE: U8 = np.array(
    [dtype_code({1: "int8", 2: "int16", 4: "int32", 8: "int64"}[dtype.itemsize]) for dtype in DTYPES],
    np.uint8,
)
_BYTE = dtype_code("uint8")


@dataclass(frozen=True, slots=True)
class _UnevenCast:
    """A cast between byte positions that are no whole elements: goes through buffers."""

    source: torch.Tensor
    destination: torch.Tensor
    source_dtype: torch.dtype
    destination_dtype: torch.dtype

    def cast(self) -> torch.Tensor:
        return _elements(self.source, self.source_dtype).to(self.destination_dtype).view(torch.uint8)


def _elements(byte_view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes from anywhere as elements; the clone begins where elements may begin."""
    return byte_view.clone(memory_format=torch.contiguous_format).view(dtype)


class CopyProgram:
    """Strided copies between memory blocks, ready to run as often as wished.

    Rows of equal dtypes move their bits; others are cast as `Tensor.copy_` does. The views keep the blocks'
    memory alive; the program is wrong once a live tensor gets other storage.

    Args:
        copies: What to copy; destinations must not overlap.
        sources: Flat uint8 blocks that `src_block` indexes.
        destinations: What `dst_block` indexes: flat uint8 blocks, or tensors of the row's `dst_dtype` whose
            bytes are counted from their first element (parameters, inference tensors, non-contiguous ones).

    Raises:
        PlanError: A row reaches outside its memory, or a destination has another dtype.
    """

    def __init__(
        self, copies: CopyTable, sources: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor]
    ) -> None:
        rows = np.flatnonzero(copies.num_elements)
        copies = copies.take(rows)
        _check_dtypes(copies, destinations)
        with torch.inference_mode():
            source = _Side(Rows.sources(copies), sources, "source")
            target = _Side(Rows.destinations(copies), destinations, "destination")
            exact = copies.src_dtype == copies.dst_dtype
            even = source.aligned & target.aligned
            bits = np.where(exact, _BITS_CODE[copies.src_dtype], copies.src_dtype).astype(np.uint8)
            target_bits = np.where(exact, bits, copies.dst_dtype).astype(np.uint8)
            whole, bytewise = np.flatnonzero(even), np.flatnonzero(~even & exact)
            self._sources = source.views(whole, bits) + source.byte_views(bytewise)
            self._destinations = target.views(whole, target_bits) + target.byte_views(bytewise)
            uneven = np.flatnonzero(~even & ~exact)
            self._casts = [
                _UnevenCast(src, dst, _TORCH[src_code], _TORCH[dst_code])
                for src, dst, src_code, dst_code in zip(
                    source.byte_views(uneven),
                    target.byte_views(uneven),
                    copies.src_dtype[uneven],
                    copies.dst_dtype[uneven],
                    strict=True,
                )
            ]
        self._rows: list[int] = rows[np.concatenate((whole, bytewise, uneven))].tolist()

    def run(self) -> None:
        """Copy everything once; blocking for host memory, on the current stream for device memory."""
        with torch.inference_mode():
            if self._destinations:
                torch._foreach_copy_(self._destinations, self._sources)
            for uneven in self._casts:
                uneven.destination.copy_(uneven.cast())

    def differences(self) -> list[int]:
        """Return the rows whose destination does not have the bits that `run` writes, in ascending order.

        The bits of a NaN count where dtypes are equal; a cast may write any NaN: torch's own kernels differ.
        """
        with torch.inference_mode():
            same = [_same(src, dst) for src, dst in zip(self._sources, self._destinations, strict=True)]
            same += [
                _same_values(
                    u.cast().view(u.destination_dtype), _elements(u.destination, u.destination_dtype)
                )
                for u in self._casts
            ]
        return sorted(row for row, equal in zip(self._rows, same, strict=True) if not equal)


class _Side:
    """One side of the copies as views of torch storages."""

    def __init__(self, rows: Rows, blocks: Sequence[torch.Tensor], side: str) -> None:
        offsets = [block.storage_offset() * block.element_size() for block in blocks]
        rows.check([addressable_bytes(block) for block in blocks], side)
        begin = np.array([*offsets, 0], np.int64)[rows.block]
        self._rows = Rows(rows.block, rows.base + begin, rows.strides, rows.shape, rows.dtype)
        self._blocks = blocks
        self._typed: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def aligned(self) -> Mask:
        return self._rows.aligned

    def views(self, rows: I64, codes: U8) -> list[torch.Tensor]:
        """Return a view per row, elements of the given dtype codes."""
        chosen = self._rows.take(rows)
        itemsize = ITEMSIZES[codes[rows]]
        bases = [self._base(*key) for key in zip(chosen.block.tolist(), codes[rows].tolist(), strict=True)]
        strides = chosen.strides // itemsize[:, None]
        return _as_strided(bases, chosen.shape, strides, chosen.base // itemsize)

    def byte_views(self, rows: I64) -> list[torch.Tensor]:
        """Return a view per row as bytes, with an inner dim of one element's bytes."""
        chosen = self._rows.take(rows)
        shape = np.concatenate((chosen.shape, chosen.itemsize[:, None]), axis=1)
        strides = np.concatenate((chosen.strides, np.ones((len(chosen), 1), np.int64)), axis=1)
        return _as_strided([self._base(b, _BYTE) for b in chosen.block.tolist()], shape, strides, chosen.base)

    def _base(self, block: int, code: int) -> torch.Tensor:
        """Return the whole storage of a block as one flat tensor; it knows nothing of autograd."""
        found = self._typed.get((block, code))
        if found is None:
            storage = self._blocks[block].untyped_storage()
            found = torch.empty(0, dtype=_TORCH[code], device=self._blocks[block].device)
            found.set_(storage, 0, (storage.nbytes() // found.element_size(),), (1,))
            self._typed[block, code] = found
        return found


def _as_strided(bases: list[torch.Tensor], shape: I64, strides: I64, offsets: I64) -> list[torch.Tensor]:
    return list(map(torch.as_strided, bases, shape.tolist(), strides.tolist(), offsets.tolist()))


def addressable_bytes(block: torch.Tensor) -> int:
    """Return how many bytes may be addressed from the first element of a block."""
    if is_flat(block):
        return block.numel()
    return block.untyped_storage().nbytes() - int(block.storage_offset()) * block.element_size()


def is_flat(block: torch.Tensor) -> bool:
    """Return whether a block is plain bytes, of any dtype's rows."""
    return block.dtype == torch.uint8 and block.ndim == 1 and block.is_contiguous()


def _check_dtypes(copies: CopyTable, destinations: Sequence[torch.Tensor]) -> None:
    for index, block in enumerate(destinations):
        if is_flat(block):
            continue
        codes = {_TORCH[code] for code in copies.dst_dtype[copies.dst_block == index].tolist()}
        if codes - {block.dtype}:
            named = ", ".join(sorted(str(code) for code in codes))
            message = (
                f"destination {index} holds {block.dtype}, its copies write {named}; record the recipe again"
            )
            raise PlanError(message)


def _same(source: torch.Tensor, destination: torch.Tensor) -> bool:
    source = source.to(destination.device)
    if source.dtype == destination.dtype:
        return torch.equal(source, destination)
    return _same_values(source.to(destination.dtype), destination)


def _same_values(expected: torch.Tensor, found: torch.Tensor) -> bool:
    bits = _TORCH[_BITS_CODE[dtype_code(str(found.dtype).removeprefix("torch."))]]
    equal = expected.view(bits) == found.to(expected.device).view(bits)
    return bool(equal.all()) or bool((equal | (expected.float().isnan() & found.float().isnan())).all())
