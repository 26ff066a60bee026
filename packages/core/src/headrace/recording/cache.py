"""Keeps recipes: in memory, and as msgpack files that a later worker of the same layout can use."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace.geometry import RegionTable
from headrace.recipe import FillTable, LoadRecipe
from headrace.types import ParamMeta, ParamTable, dtype_code

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the file format; raise it when a LoadRecipe means something else than before."""


class _Array(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class _Body(msgspec.Struct, frozen=True):
    layout: str
    sources: list[tuple[str, str, tuple[int, ...]]]
    targets: list[tuple[str, str, tuple[int, ...]]]
    regions: dict[str, _Array]
    fills: dict[str, _Array]
    opaque: _Array
    unused: _Array
    opaque_reasons: dict[str, str]
    proven: bool


class _File(msgspec.Struct, frozen=True):
    format: int
    digest: bytes
    body: bytes


class RecipeCache:
    """Recipes by worker layout and source: `WorkerIdentity.layout` and `ParamTable.key`.

    Args:
        folder: Where files are kept too, made with mode 0700 if missing; None keeps recipes in memory only.
            Whoever may write to it decides where weights go.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._recipes: dict[tuple[str, str], LoadRecipe] = {}

    def get(self, layout: str, sources: ParamTable) -> LoadRecipe | None:
        """Return the recipe of a layout and source, or None. A damaged file is ignored and logged."""
        key = (layout, sources.key)
        if key not in self._recipes:
            found = self._read(layout, sources)
            if found is None:
                return None
            self._recipes[key] = found
        return self._recipes[key]

    def put(self, layout: str, recipe: LoadRecipe) -> None:
        """Keep a recipe, in place of an earlier one. A folder that cannot be written is only logged."""
        self._recipes[layout, recipe.sources.key] = recipe
        if self._folder is None:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(self._path(layout, recipe.sources.key), _encode(layout, recipe))
        except OSError as error:
            logger.warning("recipe cache %s cannot be written: %s", self._folder, error)

    def _path(self, layout: str, source_key: str) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256(f"{layout}\n{source_key}".encode()).hexdigest()
        return self._folder / f"{digest[:32]}.recipe"

    def _read(self, layout: str, sources: ParamTable) -> LoadRecipe | None:
        if self._folder is None:
            return None
        path = self._path(layout, sources.key)
        try:
            return _decode(path.read_bytes(), layout, sources)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, msgspec.MsgspecError) as error:
            logger.warning("recipe file %s is ignored: %s", path, error)
            return None


def _write(path: Path, data: bytes) -> None:
    """Put a whole file in place or none: several workers may write the same one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".recipe-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _encode(layout: str, recipe: LoadRecipe) -> bytes:
    body = msgspec.msgpack.encode(
        _Body(
            layout=layout,
            sources=[(m.name, m.dtype, m.shape) for m in recipe.sources],
            targets=[(m.name, m.dtype, m.shape) for m in recipe.targets],
            regions=_columns(recipe.regions),
            fills=_columns(recipe.fills),
            opaque=_pack(recipe.opaque),
            unused=_pack(recipe.unused),
            opaque_reasons=recipe.opaque_reasons,
            proven=recipe.proven,
        )
    )
    return msgspec.msgpack.encode(_File(FORMAT, hashlib.sha256(body).digest(), body))


def _decode(data: bytes, layout: str, sources: ParamTable) -> LoadRecipe:
    file = msgspec.msgpack.decode(data, type=_File)
    if file.format != FORMAT:
        raise ValueError(f"it has format {file.format}, this is {FORMAT}")
    if hashlib.sha256(file.body).digest() != file.digest:
        raise ValueError("its digest does not fit its content")
    body = msgspec.msgpack.decode(file.body, type=_Body)
    recipe = LoadRecipe(
        sources=_table(body.sources),
        targets=_table(body.targets),
        regions=RegionTable(**{name: _unpack(array) for name, array in body.regions.items()}),
        fills=FillTable(**{name: _unpack(array) for name, array in body.fills.items()}),
        opaque=_unpack(body.opaque),
        unused=_unpack(body.unused),
        opaque_reasons=body.opaque_reasons,
        proven=body.proven,
    )
    if body.layout != layout or recipe.sources != sources:
        raise ValueError("it belongs to another layout or source")
    _check(recipe)
    return recipe


def _check(recipe: LoadRecipe) -> None:
    """Refuse a recipe that points outside of its own tables."""
    regions, fills = recipe.regions, recipe.fills
    tables = ((regions.param, recipe.sources), (regions.block, recipe.targets), (fills.block, recipe.targets),
              (recipe.opaque, recipe.sources), (recipe.unused, recipe.sources))  # fmt: skip
    for ids, table in tables:
        if len(ids) and (ids.min() < 0 or ids.max() >= len(table)):
            raise ValueError("an id lies outside of its table")
    wide, whole = regions.widened(recipe.sources.max_ndim), recipe.sources.shapes[regions.param]
    if wide.ndim != whole.shape[1] or (wide.offsets < 0).any() or (wide.offsets + wide.shape > whole).any():
        raise ValueError("a box lies outside of its source")
    if any((column < 0).any() for column in (regions.base, regions.strides, fills.base, fills.strides)):
        raise ValueError("a region begins before its target")


def _table(rows: list[tuple[str, str, tuple[int, ...]]]) -> ParamTable:
    for _, dtype, _ in rows:
        dtype_code(dtype)
    return ParamTable(ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in rows)


def _columns(table: Any) -> dict[str, _Array]:  # noqa: ANN401 - either table
    return {column.name: _pack(getattr(table, column.name)) for column in fields(table)}


def _pack(array: np.ndarray) -> _Array:
    return _Array(array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes())


def _unpack(array: _Array) -> np.ndarray:
    if array.dtype not in ("<i4", "<i8", "<f8"):
        raise ValueError(f"an array has element type {array.dtype}")
    return np.frombuffer(array.data, array.dtype).reshape(array.shape).copy()
