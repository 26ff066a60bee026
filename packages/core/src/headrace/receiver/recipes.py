"""RecipeBook: which recipe this worker trusts for a source, and how a recipe comes to be trusted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from headrace.config import host_settings
from headrace.errors import CheckpointError, ManifestMismatchError
from headrace.planner import check_fit
from headrace.protocols import InferenceBackend
from headrace.recipe import LoadRecipe
from headrace.recording import RecipeCache, opaque_recipe, prove, record, whole_tensors
from headrace.store.checkpoint import CheckpointSource
from headrace.telemetry import Recorder
from headrace.types import DTYPES, ParamMeta, ParamTable, dtype_code

logger = logging.getLogger(__name__)
SHOWN = 10


@dataclass(frozen=True)
class Entry:
    """What to update with now, and what was recorded but not yet proven."""

    recipe: LoadRecipe
    unproven: LoadRecipe | None


class RecipeBook:
    """Recipes of one worker, by the source's names, dtypes and shapes; used by one session at a time."""

    def __init__(self, backend: InferenceBackend, recorder: Recorder) -> None:
        self._backend = backend
        self._recorder = recorder
        self._entries: dict[str, Entry] = {}
        self._cache = RecipeCache(host_settings().recipe_cache)
        self._untouched = True
        self._own_folder = backend.loaded_from()

    def known(self, metas_key: str) -> Entry | None:
        """Return the entry for a source, if one was made."""
        return self._entries.get(metas_key)

    def entry(self, metas: ParamTable) -> Entry:
        """Return the recipe to use for a source: recorded and, where the engine's own checkpoint allows, proven.

        Raises:
            ManifestMismatchError: The source does not fit the model; lists every difference.
            UncoveredRegionError: The source leaves live tensors unfilled.
        """
        entry = self._entries.get(metas.key)
        if entry is None:
            entry = self._entries[metas.key] = self._reordered(metas) or self._make(metas)
        return entry

    def touched(self) -> None:
        """Note that live tensors no longer hold what the engine loaded at its start."""
        self._untouched = False

    def prove_with(self, metas_key: str, sources: Mapping[str, torch.Tensor]) -> None:
        """Compare a recorded recipe with what the engine's loader has just made of `sources` (whole tensors)."""
        entry = self._entries[metas_key]
        if entry.unproven is None:
            return
        with self._recorder.span("prove"):
            recipe = prove(
                entry.unproven, self._live(), sources.__getitem__, reload_unit=self._backend.reload_unit
            )
        self._keep(metas_key, recipe)

    def _reordered(self, metas: ParamTable) -> Entry | None:
        """Return a proven entry for the same parameters in another order: a trainer's is seldom the file's."""
        wanted = frozenset(metas)
        for entry in self._entries.values():
            if entry.unproven is None and frozenset(entry.recipe.sources) == wanted:
                return entry
        return None

    def _make(self, metas: ParamTable) -> Entry:
        self._check_kinds(metas)
        skeleton = self._backend.skeleton()
        if skeleton is not None and skeleton.for_source is not None:
            skeleton = skeleton.for_source(metas)
        cached = self._cache.get(self._backend.identity().layout, metas)
        if cached is not None:
            return Entry(cached, None)
        if skeleton is None:
            return Entry(opaque_recipe(metas, self._live()), None)
        with self._recorder.span("record"):
            recorded = record(
                skeleton,
                metas,
                live=self._live(),
                reload_unit=self._backend.reload_unit,
                optional=self._backend.optional,
                derived=self._backend.derived(),
                can_rederive=self._backend.rederive(()),
            )
        check_fit(recorded, metas)
        return self._proven_at_start(recorded, metas) or Entry(
            self._through_loader(recorded, metas), recorded
        )

    def _check_kinds(self, metas: ParamTable) -> None:
        """Refuse a source whose tensors have other shapes or kinds of elements than what the engine is known to take.

        A loader that raises on a shape while it is recorded looks like one that needs data: the tensor would be
        opaque, and would fail only in the commit. One that copies integers into floats does so without a word.

        Raises:
            ManifestMismatchError: Lists every difference.
        """
        known = self._known_kinds()
        pairs = [(meta, known[meta.name]) for meta in metas if meta.name in known]
        wrong = [
            f"{meta.name} is {meta.dtype} {meta.shape}, the engine's checkpoint has {mine.dtype} {mine.shape}"
            for meta, mine in pairs
            if meta.shape != mine.shape or not _castable(meta.dtype, mine.dtype)
        ]
        if wrong:
            shown = "; ".join(wrong[:SHOWN]) + ("; ..." if len(wrong) > SHOWN else "")
            message = f"the source is of another model, {len(wrong)} tensors differ: {shown}"
            raise ManifestMismatchError(message, wrong, phase="describe", name=wrong[0].split(" ")[0])

    def _known_kinds(self) -> dict[str, ParamMeta]:
        """Return what the engine started from, and what proven updates brought it, without what it has no use for."""
        known: dict[str, ParamMeta] = {}
        for recipe in [entry.recipe for entry in self._entries.values() if entry.unproven is None]:
            unused = set(recipe.unused.tolist())
            known |= {meta.name: meta for i, meta in enumerate(recipe.sources) if i not in unused}
        own = self._own_checkpoint()
        if own is not None:
            with closing(own):
                known |= {meta.name: meta for meta in own.metadata()}
        return known

    def _own_checkpoint(self) -> CheckpointSource | None:
        """Return the checkpoint that the engine started from, where it still can be read."""
        folder = self._own_folder
        if folder is None or not Path(folder).exists():
            return None
        try:
            return CheckpointSource(folder)
        except CheckpointError as error:
            logger.warning("the engine's own checkpoint %s cannot be read: %s", folder, error)
            return None

    def _through_loader(self, recorded: LoadRecipe, metas: ParamTable) -> LoadRecipe:
        """Return the recipe of an update that proves another: all sources that the loader uses go through it."""
        everything = opaque_recipe(metas, self._live())
        used = np.setdiff1d(everything.opaque, recorded.unused).astype(np.int32)
        left = frozenset(recorded.left)
        reasons = {name: why for name, why in everything.opaque_reasons.items() if name not in left}
        # What was recorded as views and copies is not written to, so that the loader may read it where it lies.
        seen = np.setdiff1d(recorded.regions.param, recorded.opaque)
        only_read = np.intersect1d(used, seen).astype(np.int32)
        return replace(
            everything, opaque=used, unused=recorded.unused, opaque_reasons=reasons, only_read=only_read
        )

    def _proven_at_start(self, recorded: LoadRecipe, metas: ParamTable) -> Entry | None:
        """Prove against the checkpoint that the engine was started from, while its weights still are those."""
        if not self._untouched or self._backend.loaded_from() is None:
            return None
        source = self._own_checkpoint()
        if source is None:
            return None
        with closing(source):
            if frozenset(source.metadata()) != frozenset(metas):
                return None
            with self._recorder.span("prove"):
                recipe = prove(
                    recorded, self._live(), whole_tensors(source), reload_unit=self._backend.reload_unit
                )
        return self._keep(metas.key, recipe)

    def _keep(self, metas_key: str, recipe: LoadRecipe) -> Entry:
        self._cache.put(self._backend.identity().layout, recipe)
        entry = self._entries[metas_key] = Entry(recipe, None)
        return entry

    def _live(self) -> Mapping[str, torch.Tensor]:
        return self._backend.live_tensors()


def _castable(source: str, own: str) -> bool:
    """Return whether elements of `source` may stand where the engine knows `own`: equal, or both plain floats."""
    kinds = {DTYPES[dtype_code(name)].kind for name in (source, own)}
    return source == own or kinds == {"float"}
