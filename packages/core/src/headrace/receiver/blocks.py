"""Destinations of a plan as flat bytes: live tensors where they are, and buffers for what the loader must see whole."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from headrace.errors import CapacityError
from headrace.plan import TransferPlan
from headrace.recipe import FillTable, LoadRecipe
from headrace.types import ParamMeta


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory that `tensor` spans, from its first element on, as uint8; shares storage."""
    span = (
        1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel()
        else 0
    )
    return torch.as_strided(tensor.detach(), (span,), (1,)).view(torch.uint8)


@dataclass
class Destinations:
    """What `dst_block` of a plan means in this worker.

    Attributes:
        targets: Live tensors of the recipe, in order.
        opaque: Source name to a whole tensor that the engine's loader will get, in the plan's order.
    """

    targets: list[torch.Tensor]
    opaque: dict[str, torch.Tensor]

    @classmethod
    def of(
        cls, recipe: LoadRecipe, plan: TransferPlan, live: Mapping[str, torch.Tensor], device: str
    ) -> Destinations:
        """Find live tensors and allocate opaque buffers; pages are touched by the first copy into them.

        What the loader reads in mapped memory has an empty tensor here until `put` brings it.
        """
        with torch.inference_mode():
            targets = [live[meta.name] for meta in recipe.targets]
            metas = [recipe.sources[int(i)] for i in plan.opaque]
            opaque = {meta.name: meta for meta in metas}
            for position in plan.lent[:, 0].tolist():
                opaque[metas[position].name] = replace(metas[position], shape=(0,))
            return cls(targets, {name: _allocate(meta, device) for name, meta in opaque.items()})

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the loader these tensors, by source name, in place of empty ones."""
        self.opaque |= tensors

    def blocks(self) -> list[torch.Tensor]:
        """Return all destinations as flat uint8 blocks, targets first."""
        with torch.inference_mode():
            return [flat_bytes(tensor) for tensor in (*self.targets, *self.opaque.values())]

    def pointers(self) -> list[int]:
        """Return where the live tensors lie, to notice that an engine has moved them."""
        return [tensor.data_ptr() for tensor in self.targets]


def _allocate(meta: ParamMeta, device: str) -> torch.Tensor:
    try:
        return torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device=device)
    except RuntimeError as error:
        message = f"no memory to stage {meta.name} ({meta.num_bytes / 1e6:.1f} MB): {error}"
        raise CapacityError(message, name=meta.name, phase="stage") from error


def allocate_bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Return a staging buffer: flat uint8, on a host in huge pages where the kernel has them.

    Raises:
        CapacityError: The device has no room.
    """
    try:
        if device.type != "cpu" or not num_bytes:
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        # Its own mapping: giving it back takes neither the interpreter lock nor a page at a time.
        pages = mmap.mmap(-1, num_bytes)
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.uint8)
    except (RuntimeError, OSError) as error:
        message = f"no memory on {device} to stage {num_bytes / 1e6:.1f} MB: {error}; lower budget_bytes"
        raise CapacityError(message, name="budget_bytes", phase="stage") from error


class StagingArea:
    """Memory for what is staged before the pause: what was reserved where that is enough, else newly allocated.

    Args:
        reserved: Flat uint8 tensor that an adapter took before the engine sized its caches; kept for good.
    """

    def __init__(self, reserved: torch.Tensor | None = None) -> None:
        self._reserved = reserved
        self._taken = 0

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are there whatever the engine takes."""
        return 0 if self._reserved is None else self._reserved.numel()

    def clear(self) -> None:
        """Begin anew: what was taken for an earlier update may be given out again."""
        self._taken = 0

    def take(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Return a buffer for one update: flat uint8, its content undefined.

        Raises:
            CapacityError: The device has no room.
        """
        reserved, begin = self._reserved, self._taken
        if reserved is None or reserved.device != device or begin + num_bytes > reserved.numel():
            return allocate_bytes(num_bytes, device)
        self._taken += num_bytes
        return reserved[begin : begin + num_bytes]

    def holds(self, buffer: torch.Tensor) -> bool:
        """Return whether a buffer lies in the reserved memory, and so stays."""
        own = self._reserved
        return own is not None and own.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def write_fills(fills: FillTable, targets: Sequence[torch.Tensor]) -> None:
    """Write the loader's constants (padding of vocabularies and shards) into live tensors."""
    for place, value in _fill_views(fills, targets):
        place.fill_(value)


def unmet_fills(fills: FillTable, targets: Sequence[torch.Tensor]) -> FillTable:
    """Return the constants that live tensors do not hold yet: those stand from one version to the next."""
    unmet = [not bool((place == value).all()) for place, value in _fill_views(fills, targets)]
    return fills.take(np.flatnonzero(unmet))


def _fill_views(fills: FillTable, targets: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, float]]:
    for row in range(len(fills)):
        target = targets[int(fills.block[row])]
        offset = target.storage_offset() + int(fills.base[row])
        shape, strides = fills.shape[row].tolist(), fills.strides[row].tolist()
        yield torch.as_strided(target, shape, strides, offset), float(fills.value[row])
