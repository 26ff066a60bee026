"""Makes a LoadRecipe out of what the recorder saw: live tensors, coverage, what is opaque."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace.errors import ManifestMismatchError, UncoveredRegionError
from headrace.geometry import Box, Loop, RegionTable, Shape, contiguous_strides
from headrace.protocols import Skeleton
from headrace.recipe import FillTable, LoadRecipe
from headrace.recording.loading import Recording, run_loader
from headrace.recording.spread import Opaque, spread
from headrace.recording.surface import FILL, Piece, Surface, place
from headrace.types import DTYPES, ParamMeta, ParamTable, dtype_code

logger = logging.getLogger(__name__)

Row = tuple[int, Box, int, int, Sequence[int]]


@dataclass(frozen=True)
class Rules:
    """What the backend says about its tensors; see `InferenceBackend`."""

    reload_unit: Callable[[str], str]
    optional: Callable[[str], bool]
    derived: Mapping[str, Sequence[str]]
    can_rederive: bool


def record(  # noqa: PLR0913 - the backend's answers, each by its name
    skeleton: Skeleton,
    sources: ParamTable,
    *,
    live: Mapping[str, torch.Tensor] | None,
    reload_unit: Callable[[str], str],
    optional: Callable[[str], bool],
    derived: Mapping[str, Sequence[str]],
    can_rederive: bool,
) -> LoadRecipe:
    """Run the engine's loader on its skeleton and return what it copies where. Not proven yet.

    In the worker, no collective, no device work; blocks as long as the loader takes without data. What the
    loader submits to a `ThreadPoolExecutor` runs on the calling thread. Live tensors are only looked at.

    Args:
        skeleton: Structure and loader; left as it was.
        sources: All parameters of the source.
        live: The engine's live tensors, or None where the skeleton's names and layouts are the live ones.
        reload_unit: Unit that a target is reloaded with.
        optional: Whether a target may stay as it is.
        derived: Tensors computed after loading, and what feeds them.
        can_rederive: Whether the engine can compute them again.

    Returns:
        The recipe. Its targets are the live tensors; of several names of one memory the first.

    Raises:
        ManifestMismatchError: The loader refuses the shape of sources; lists them.
        UncoveredRegionError: The loader leaves elements of live tensors unwritten; lists all.
    """
    tensors = skeleton.tensors if live is None else live
    rules = Rules(reload_unit, optional, derived, can_rederive)
    recording = run_loader(skeleton, sources, live or {})
    if recording is None:
        logger.info("the loader cannot be recorded; every parameter goes through the engine's loader")
        return opaque_recipe(sources, tensors, "the loader raises without data")
    if recording.misfits:
        wrong = [f"{sources[i].name} {sources[i].shape}: {why}" for i, why in recording.misfits.items()]
        message = f"{len(wrong)} tensors of the source do not fit the model, e.g. {wrong[0]}"
        raise ManifestMismatchError(message, wrong, phase="describe", name=sources[min(recording.misfits)].name)
    return _Assembly(skeleton, sources, tensors, recording, rules).recipe()


def opaque_recipe(
    sources: ParamTable, live: Mapping[str, torch.Tensor], why: str = "the engine gives no skeleton"
) -> LoadRecipe:
    """Return the recipe of an engine that cannot be recorded: everything goes through its own loader."""
    targets = _table(live)
    return LoadRecipe(
        sources=sources,
        targets=targets,
        regions=RegionTable.empty(sources.max_ndim),
        fills=FillTable.empty(),
        opaque=np.arange(len(sources), dtype=np.int32),
        unused=np.zeros(0, np.int32),
        opaque_reasons={meta.name: why for meta in targets},
    )


class _Assembly:
    """One recipe in the making."""

    def __init__(
        self,
        skeleton: Skeleton,
        sources: ParamTable,
        live: Mapping[str, torch.Tensor],
        recording: Recording,
        rules: Rules,
    ) -> None:
        self._skeleton, self._sources, self._live = skeleton, sources, live
        self._recording, self._rules = recording, rules
        self._surfaces = recording.recorder.targets
        self._reasons: dict[str, str] = {}
        aliases = {name for name, owner in recording.aliases.items() if self._one_memory(name, owner)}
        self._targets = _table({name: tensor for name, tensor in live.items() if name not in aliases})
        self._rows: dict[str, list[Row]] = {}
        self._fills: dict[str, list[Piece]] = {}

    def recipe(self) -> LoadRecipe:
        self._refuse_targets()
        for name, surface in self._surfaces.items():
            self._place(name, surface)
        self._check_coverage()
        opaque = self._spread()
        kept = [name for name in self._rows if name not in opaque.reasons]
        rows = [row for name in kept for row in self._rows[name]]
        used = {row[0] for row in rows} | opaque.sources
        known = self._targets.index_of
        reasons = {name: why for name, why in opaque.reasons.items() if known(name) is not None}
        return LoadRecipe(
            sources=self._sources,
            targets=self._targets,
            regions=RegionTable.from_rows(rows, self._sources.max_ndim),
            fills=self._fill_table([(name, piece) for name in kept for piece in self._fills[name]]),
            opaque=_ids(opaque.sources),
            unused=_ids(set(range(len(self._sources))) - used),
            opaque_reasons=reasons,
        )

    def _one_memory(self, name: str, owner: str) -> bool:
        """Whether live tensors that the skeleton ties are tied; where not, neither can be recorded."""
        a, b = self._live.get(name), self._live.get(owner)
        if a is not None and b is not None and _memory(a) != _memory(b):
            why = f"{name} and {owner} are one memory for the loader and two in the engine"
            self._reasons |= {name: why, owner: why}
            return False
        return b is not None

    def _refuse_targets(self) -> None:
        """Name the targets whose memory is not what the loader wrote to."""
        self._reasons |= self._recording.unusable
        for name, guard in self._recording.recorder.guards.items():
            if guard.broken is not None:
                self._reasons[name] = "the loader writes to the live tensor and not to the skeleton's"
        aliases = self._recording.aliases
        for name, tensor in self._live.items():
            if name in self._skeleton.tensors:
                self._refuse_if(name, _layout_difference(self._skeleton.tensors[name], tensor))
            elif not self._rules.optional(name) and name not in self._rules.derived:
                self._refuse_if(name, "the tensor did not exist when the engine loaded its weights")
        for name, surface in self._surfaces.items():
            if name not in self._live and surface.feeds and not any(o == name for o in aliases.values()):
                self._refuse_if(name, "the engine removed the tensor after loading")
        for names in _overlapping({m.name: self._live[m.name] for m in self._targets}):
            for name in names:
                self._refuse_if(name, f"shares memory with {', '.join(n for n in names if n != name)}")
        if not self._rules.can_rederive:
            for derived, inputs in self._rules.derived.items():
                for name in inputs:
                    self._refuse_if(self._recording.aliases.get(name, name), f"{derived} is computed from it")

    def _refuse_if(self, name: str, why: str | None) -> None:
        if why is not None:
            self._reasons.setdefault(name, why)

    def _place(self, name: str, surface: Surface) -> None:
        """Turn what was written to a target into boxes of sources."""
        if surface.grid is None or surface.broken is not None:
            return self._refuse_if(name, surface.broken or "the tensor's elements share memory")
        block = self._targets.index_of(name)
        if block is None or name in self._reasons:
            return None
        pieces = [_inside(piece, surface.grid.valid) for piece in surface.settle()]
        rows: list[Row] = []
        for piece in pieces:
            if piece is not None and piece.content.source != FILL:
                why = self._add_rows(rows, piece, surface, block)
                if why is not None:
                    return self._refuse_if(name, why)
        self._rows[name] = rows
        self._fills[name] = [piece for piece in pieces if piece is not None and piece.content.source == FILL]
        return None

    def _add_rows(self, rows: list[Row], piece: Piece, surface: Surface, block: int) -> str | None:
        assert surface.grid is not None
        source, itemsize = piece.content.source, surface.dtype.itemsize
        meta = self._sources[source]
        why = _cast_problem(piece, meta.dtype, surface.dtype)
        if why is not None:
            return why
        dense = contiguous_strides(surface.grid.shape)
        loops = list(map(Loop, piece.box.shape, piece.strides, dense))
        placed = place(meta.shape, loops, piece.base, _flat(piece.box.offsets, dense))
        if placed is None:
            return "a copy falls into too many boxes of its source"
        rows += [(source, p.box, block, p.base * itemsize, [s * itemsize for s in p.strides]) for p in placed]
        return None

    def _check_coverage(self) -> None:
        """Refuse live tensors that the loader leaves unwritten, where what it did is exactly known."""
        missing: list[str] = []
        refused = self._recording.refused
        for name, surface in self._surfaces.items():
            known = surface.broken is None and surface.grid is not None and name in self._live
            if not known or name in self._rules.derived or not surface.num_missing():
                continue
            if refused:
                which = self._sources[next(iter(refused))].name
                self._refuse_if(name, f"may be filled from {which}, on which the loader raised")
            elif not self._rules.optional(name):
                missing.append(self._missing(name, surface))
        if missing:
            raise UncoveredRegionError(
                f"the source leaves {len(missing)} live tensors without values: {'; '.join(missing)}; "
                "give a source with these parameters, or let the backend name them optional",
                phase="record",
                name=missing[0].split(" ")[0],
            )

    def _missing(self, name: str, surface: Surface) -> str:
        known = [self._sources[i].name for i in sorted(surface.feeds)]
        text = f"{name} lacks {surface.num_missing()} of {self._live[name].numel()} elements"
        return f"{text} (has {', '.join(known[:8])})" if known else text

    def _spread(self) -> Opaque:
        feeds = {name: surface.feeds for name, surface in self._surfaces.items()}
        sources = dict(self._recording.refused)
        for id_ in self._recording.leftovers:
            sources.setdefault(id_, "a source is kept outside of the known tensors")
        if any(name in self._live and s.broken and not s.feeds for name, s in self._surfaces.items()):
            used = {id_ for surface in self._surfaces.values() for id_ in surface.feeds}
            for id_ in set(range(len(self._sources))) - used:
                sources.setdefault(id_, "it may feed a tensor whose values were not followed")
        return spread(feeds, self._reasons, sources, self._rules.reload_unit)

    def _fill_table(self, fills: list[tuple[str, Piece]]) -> FillTable:
        width = max((len(piece.box.shape) for _, piece in fills), default=1) or 1
        shape, strides = np.ones((len(fills), width), np.int64), np.zeros((len(fills), width), np.int64)
        base = np.zeros(len(fills), np.int64)
        for i, (name, piece) in enumerate(fills):
            grid = self._surfaces[name].grid
            dense = contiguous_strides(grid.shape if grid else ())
            base[i] = _flat(piece.box.offsets, dense)
            shape[i, : len(dense)], strides[i, : len(dense)] = piece.box.shape, dense
        block = np.array([self._targets.index_of(name) for name, _ in fills], np.int32)
        values = np.array([piece.content.value for _, piece in fills], np.float64)
        return FillTable(block, base, shape, strides, values)


def _layout_difference(skeleton: torch.Tensor, live: torch.Tensor) -> str | None:
    for what, wrote, has in (
        ("shape", tuple(skeleton.shape), tuple(live.shape)),
        ("dtype", skeleton.dtype, live.dtype),
        ("strides", skeleton.stride(), live.stride()),
    ):
        if wrote != has:
            return f"the engine changed its {what} after loading from {wrote} to {has}"
    return None


def _cast_problem(piece: Piece, source: str, target: torch.dtype) -> str | None:
    name = _name(target)
    if not piece.content.lands_in(target):
        return f"a cast chain from {source} rounds to {piece.content.dtype} before it ends in {name}"
    if source != name and {DTYPES[dtype_code(dtype)].kind for dtype in (source, name)} != {"float"}:
        return f"a cast from {source} to {name} is the engine's to make"
    return None


def _inside(piece: Piece, valid: Box) -> Piece | None:
    common = piece.box.intersect(valid)
    return None if common is None else piece.cut(common)


def _flat(offsets: Shape, dense: Shape) -> int:
    return sum(i * s for i, s in zip(offsets, dense, strict=True))


def _table(tensors: Mapping[str, torch.Tensor]) -> ParamTable:
    return ParamTable(ParamMeta(name, _name(t.dtype), tuple(t.shape)) for name, t in tensors.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ids(ids: Iterable[int]) -> np.ndarray:
    return np.array(sorted(ids), np.int32)


def _memory(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.stride()


def _overlapping(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Return groups of names whose bytes overlap."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            size = tensor.element_size()
            begin = int(tensor.storage_offset()) * size
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            key = tensor.untyped_storage()._cdata
            spans.setdefault(key, []).append((begin, begin + reach * size, name))
    groups: list[list[str]] = []
    for found in spans.values():
        end = -1
        for begin, stop, name in sorted(found):
            if begin >= end:
                groups.append([])
            groups[-1].append(name)
            end = max(end, stop)
    return [group for group in groups if len(group) > 1]
