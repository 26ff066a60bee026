"""Value types that every layer shares: element types, parameters and tables of them, who a worker is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from headrace.errors import ConfigError

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

DTypeKind = Literal["float", "quantised", "integer"]
RouteName = Literal["auto", "direct", "broadcast", "p2p"]
CacheMode = Literal["recompute", "keep"]
VerifyMode = Literal["none", "digest", "full"]
BarrierName = Literal["auto", "pause", "hold"]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type; `name` is torch's without the `torch.` prefix."""

    name: str
    itemsize: int
    kind: DTypeKind


DTYPES: tuple[DType, ...] = (
    DType("bfloat16", 2, "float"),
    DType("float16", 2, "float"),
    DType("float32", 4, "float"),
    DType("float64", 8, "float"),
    DType("float8_e4m3fn", 1, "quantised"),
    DType("float8_e5m2", 1, "quantised"),
    DType("float8_e8m0fnu", 1, "quantised"),
    DType("int8", 1, "integer"),
    DType("uint8", 1, "integer"),
    DType("int16", 2, "integer"),
    DType("uint16", 2, "integer"),
    DType("int32", 4, "integer"),
    DType("uint32", 4, "integer"),
    DType("int64", 8, "integer"),
    DType("uint64", 8, "integer"),
    DType("bool", 1, "integer"),
)
"""Every element type Headrace moves; the position is the code used in tables and on wires, so only append."""

DTYPE_CODES: dict[str, int] = {dtype.name: code for code, dtype in enumerate(DTYPES)}
ITEMSIZES: I64 = np.array([dtype.itemsize for dtype in DTYPES], dtype=np.int64)


def dtype_code(name: str) -> int:
    """Return the table code of a dtype name.

    Raises:
        ConfigError: The name is not one of `DTYPES`.
    """
    try:
        return DTYPE_CODES[name]
    except KeyError:
        known = ", ".join(DTYPE_CODES)
        raise ConfigError(f"element type {name!r} is not supported; known: {known}", name=name) from None


@dataclass(frozen=True, slots=True)
class ParamMeta:
    """One named tensor in Hugging Face checkpoint naming: `shape` in elements, `dtype` a name of `DTYPES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        total = 1
        for extent in self.shape:
            total *= extent
        return total

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor, stored densely."""
        return self.num_elements * DTYPES[dtype_code(self.dtype)].itemsize


class ParamTable(Sequence[ParamMeta]):
    """An ordered table of parameters with unique names; the index of a name is its id in every other table."""

    def __init__(self, metas: Iterable[ParamMeta]) -> None:
        self._metas = tuple(metas)
        self._index = {meta.name: i for i, meta in enumerate(self._metas)}
        if len(self._index) != len(self._metas):
            seen: set[str] = set()
            twice = sorted({m.name for m in self._metas if m.name in seen or seen.add(m.name)})  # type: ignore[func-returns-value]
            raise ConfigError(f"names occur twice: {', '.join(twice[:10])}", name=twice[0])

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204 - Sequence's overloads
        return self._metas[index]

    def __len__(self) -> int:
        return len(self._metas)

    def __iter__(self) -> Iterator[ParamMeta]:
        return iter(self._metas)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParamTable) and self._metas == other._metas

    def __hash__(self) -> int:
        return hash(self.key)

    def index_of(self, name: str) -> int | None:
        """Return the id of `name`, or None."""
        return self._index.get(name)

    def ids_in(self, other: ParamTable) -> I32:
        """Return, for each parameter here, its id in `other`, or -1: int32 of shape (len(self),)."""
        if self._metas == other._metas:
            return np.arange(len(self), dtype=np.int32)
        find = other._index.get
        return np.fromiter((find(m.name, -1) for m in self._metas), np.int32, len(self._metas))

    @cached_property
    def dtype_codes(self) -> U8:
        """Dtype code per parameter: uint8 of shape (len(self),)."""
        return np.fromiter((dtype_code(m.dtype) for m in self._metas), np.uint8, len(self._metas))

    @cached_property
    def max_ndim(self) -> int:
        """Largest number of dims of any parameter, at least 1."""
        return max((len(m.shape) for m in self._metas), default=1) or 1

    @cached_property
    def shapes(self) -> I64:
        """Shapes padded behind with 1: int64 of shape (len(self), max_ndim)."""
        out = np.ones((len(self), self.max_ndim), np.int64)
        for row, meta in enumerate(self._metas):
            out[row, : len(meta.shape)] = meta.shape
        return out

    @cached_property
    def num_bytes(self) -> I64:
        """Dense bytes per parameter: int64 of shape (len(self),)."""
        sizes: I64 = self.shapes.prod(axis=1) * ITEMSIZES[self.dtype_codes]
        return sizes

    @cached_property
    def key(self) -> str:
        """Digest of all names, dtypes and shapes in order: equal tables have equal keys on every machine."""
        text = "\n".join(f"{m.name}\t{m.dtype}\t{m.shape}" for m in self._metas)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class WorkerId:
    """One engine worker: its instance (one server, one string that no other instance has) and its rank in it."""

    instance: str
    rank: int

    def __str__(self) -> str:
        return f"{self.instance}[{self.rank}]"
