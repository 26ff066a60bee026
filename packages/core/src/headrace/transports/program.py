"""A copy table bound to memory: addresses and views made once, then few calls per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace.errors import PlanError
from headrace.manifest import SegmentDescriptor
from headrace.plan import CopyTable
from headrace.transports.moves import Moves
from headrace.transports.rows import Mask, Rows
from headrace.types import DTYPES, I32, I64, ITEMSIZES, U8, dtype_code

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
        undisturbed: Take the quickest way where no other Python thread of this process has work to do, as in a
            pause: dense rows of host memory move in pieces of the size that processors like best, and the
            interpreter lock is kept. Otherwise one call does it all, without the lock.

    Raises:
        PlanError: A row reaches outside its memory, or a destination has another dtype.
    """

    def __init__(
        self,
        copies: CopyTable,
        sources: Sequence[torch.Tensor],
        destinations: Sequence[torch.Tensor],
        *,
        undisturbed: bool = False,
    ) -> None:
        rows = np.flatnonzero(copies.num_elements)
        copies = copies.take(rows)
        check_dtypes(copies, destinations)
        source = _Side.of(Rows.sources(copies), sources, "source")
        target = _Side.of(Rows.destinations(copies), destinations, "destination")
        moved = np.full(len(rows), undisturbed) & (copies.src_dtype == copies.dst_dtype)
        moved &= source.plain & target.plain
        self._moves = Moves(target.addresses(moved), source.addresses(moved), source.num_bytes(moved))
        self._moved_rows = rows[moved]
        self._memory = (tuple(sources), tuple(destinations))
        self._bind(copies.take(~moved), source.take(~moved), target.take(~moved), rows[~moved])

    def _bind(self, copies: CopyTable, source: _Side, target: _Side, rows: I64) -> None:
        """Make the views of what torch copies."""
        with torch.inference_mode():
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
        self._moves.run()
        with torch.inference_mode():
            if self._destinations:
                torch._foreach_copy_(self._destinations, self._sources)
            for uneven in self._casts:
                uneven.destination.copy_(uneven.cast())

    def finish(self, deadline_s: float) -> None:
        """Return at once: copies between host memory are done when `run` returns."""

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
        different = [row for row, equal in zip(self._rows, same, strict=True) if not equal]
        return sorted(different + self._moved_rows[self._moves.differences()].tolist())


class _Side:
    """One side of the copies as views of torch storages."""

    def __init__(self, rows: Rows, blocks: Sequence[torch.Tensor]) -> None:
        self._rows = rows
        self._blocks = blocks
        self._typed: dict[tuple[int, int], torch.Tensor] = {}

    @classmethod
    def of(cls, rows: Rows, blocks: Sequence[torch.Tensor], side: str) -> _Side:
        """Check that every row lies inside its block, and count its bytes from the block's storage."""
        rows.check(per_block(rows.block, blocks, addressable_bytes).tolist(), side)
        begin = per_block(rows.block, blocks, _first_byte)[rows.block]
        return cls(Rows(rows.block, rows.base + begin, rows.strides, rows.shape, rows.dtype), blocks)

    def take(self, rows: Mask) -> _Side:
        return _Side(self._rows.take(rows), self._blocks)

    @property
    def plain(self) -> Mask:
        """Whether a row is dense and lies in host memory, shape (N,)."""
        on_host = per_block(self._rows.block, self._blocks, lambda block: block.device.type == "cpu")
        return np.asarray(self._rows.dense & (on_host[self._rows.block] != 0))

    def addresses(self, rows: Mask) -> I64:
        """Return where the chosen rows begin in this process's memory."""
        chosen = self._rows.take(rows)
        begin = per_block(chosen.block, self._blocks, lambda block: block.untyped_storage().data_ptr())
        return np.asarray(begin[chosen.block] + chosen.base)

    def num_bytes(self, rows: Mask) -> I64:
        return self._rows.take(rows).num_bytes

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


def per_block(used: I32, blocks: Sequence[torch.Tensor], fact: Callable[[torch.Tensor], int]) -> I64:
    """Return a fact of each used block, 0 for the others: a model has thousands, a bucket uses few."""
    found = np.zeros(len(blocks), np.int64)
    for block in np.unique(used).tolist():
        if 0 <= block < len(blocks):
            found[block] = fact(blocks[block])
    return found


def _first_byte(block: torch.Tensor) -> int:
    return int(block.storage_offset()) * block.element_size()


def _as_strided(bases: list[torch.Tensor], shape: I64, strides: I64, offsets: I64) -> list[torch.Tensor]:
    return list(map(torch.as_strided, bases, shape.tolist(), strides.tolist(), offsets.tolist()))


def real_copies(
    copies: CopyTable, segments: Sequence[SegmentDescriptor], blocks: Sequence[torch.Tensor]
) -> CopyTable:
    """Return the copies that move anything, of a table from segments into blocks.

    Raises:
        PlanError: A copy reaches outside its memory.
    """
    Rows.sources(copies).check([segment.num_bytes for segment in segments], "source")
    Rows.destinations(copies).check([addressable_bytes(block) for block in blocks], "destination")
    return copies.take(np.flatnonzero(copies.num_elements))


def addressable_bytes(block: torch.Tensor) -> int:
    """Return how many bytes may be addressed from the first element of a block."""
    if is_flat(block):
        return block.numel()
    return block.untyped_storage().nbytes() - int(block.storage_offset()) * block.element_size()


def is_flat(block: torch.Tensor) -> bool:
    """Return whether a block is plain bytes, of any dtype's rows."""
    return block.dtype == torch.uint8 and block.ndim == 1 and block.is_contiguous()


def check_dtypes(copies: CopyTable, destinations: Sequence[torch.Tensor]) -> None:
    """Check that destinations that are no plain bytes have the dtype of what is written into them.

    Raises:
        PlanError: One has another.
    """
    for index in np.unique(copies.dst_block).tolist():
        if not 0 <= index < len(destinations) or is_flat(destinations[index]):
            continue
        block = destinations[index]
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
    found = found.to(expected.device)
    equal = expected.view(bits) == found.view(bits)
    return bool(equal.all()) or bool((equal | (expected.float().isnan() & found.float().isnan())).all())
