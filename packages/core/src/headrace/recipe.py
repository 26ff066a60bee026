"""What is needed: the LoadRecipe, the engine's own loader written down as boxes of source parameters."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np

from headrace.geometry import RegionTable
from headrace.types import I32, I64, ParamTable


@dataclass(frozen=True)
class FillTable:
    """Constants that the loader writes (vocabulary padding): N strided ranges of targets, each one value.

    Attributes:
        block: Target id, shape (N,).
        base: First element, counted from the target tensor's own first, in elements, shape (N,).
        shape: Extents, padded behind with 1, shape (N, D).
        strides: Elements per step, shape (N, D).
        value: What is written, as float64, shape (N,).
    """

    block: I32
    base: I64
    shape: I64
    strides: I64
    value: np.ndarray

    @classmethod
    def empty(cls) -> FillTable:
        """Return a table without rows."""
        wide = np.zeros((0, 1), np.int64)
        return cls(np.zeros(0, np.int32), np.zeros(0, np.int64), wide, wide, np.zeros(0, np.float64))

    def __len__(self) -> int:
        return len(self.block)

    def take(self, rows: np.ndarray) -> FillTable:
        """Return the selected rows in that order."""
        return FillTable(self.block[rows], self.base[rows], self.shape[rows], self.strides[rows], self.value[rows])


@dataclass(frozen=True)
class LoadRecipe:
    """For one engine worker: from which source box every destination region is filled.

    Attributes:
        sources: The source's parameters, as they were given to the recorder (names, dtypes, shapes).
        targets: The worker's live tensors; shapes are this rank's own.
        regions: Recorded copies: `param` indexes `sources`, `block` indexes `targets`, bytes in the target's
            dtype, counted from the tensor's first element.
        fills: Recorded constants.
        opaque: Ids of sources that go through the engine's loader, whole; shape (M,).
        unused: Ids of sources that nothing used; shape (U,).
        opaque_reasons: Why each target that is not filled by copies is not, by target name.
        proven: Whether the recorded copies were compared with weights that the engine itself loaded.
        only_read: Ids of opaque sources that the loader was seen to read and not to change: it may be given memory of
            a holder; shape (R,).
    """

    sources: ParamTable
    targets: ParamTable
    regions: RegionTable
    fills: FillTable
    opaque: I32
    unused: I32
    opaque_reasons: dict[str, str]
    proven: bool = False
    only_read: I32 = field(default_factory=lambda: np.zeros(0, np.int32))

    @cached_property
    def left(self) -> tuple[str, ...]:
        """Names of targets that nothing fills, as the source has nothing for them; single numbers are not listed.

        Those are scales, which engines have values of their own for.
        """
        filled = {*self.regions.block.tolist(), *self.fills.block.tolist()}
        metas = (meta for i, meta in enumerate(self.targets) if i not in filled and meta.num_elements != 1)
        return tuple(meta.name for meta in metas if meta.name not in self.opaque_reasons)

    @cached_property
    def key(self) -> str:
        """Digest of everything that a plan depends on: equal recipes have equal plans."""
        digest = hashlib.sha256(f"{self.sources.key}{self.targets.key}{self.proven}".encode())
        for table in (self.regions, self.fills):
            for column in fields(table):
                digest.update(np.ascontiguousarray(getattr(table, column.name)).tobytes())
        digest.update(self.opaque.tobytes() + self.unused.tobytes() + self.only_read.tobytes())
        return digest.hexdigest()[:32]
