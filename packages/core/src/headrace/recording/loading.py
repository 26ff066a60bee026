"""Runs an engine's loader on a skeleton, again without the sources on which it raises."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any

import torch

from headrace.protocols import Skeleton
from headrace.recording.recorder import META, Recorder, recording
from headrace.recording.scalars import DataNeededError
from headrace.types import ParamTable

logger = logging.getLogger(__name__)

_SHAPE_WORDS = re.compile(r"\b(sizes?|shapes?|dimensions?|length)\b")
MAX_RUNS = 32
"""Most times that the loader is run to find out which sources it raises on."""


@dataclass
class Recording:
    """What a loader did: the memory it wrote, and what it could not be recorded with.

    Attributes:
        recorder: What was written where.
        aliases: Skeleton names that are the same memory as an earlier name.
        refused: Sources on which the loader raised, and what it raised.
        leftovers: Sources whose data lies in memory that is no target.
        unusable: Targets that cannot be recorded at all, and why.
        misfits: Sources that the loader would refuse with data too: their shape is not the one it expects.
    """

    recorder: Recorder
    aliases: dict[str, str] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    leftovers: set[int] = field(default_factory=set)
    unusable: dict[str, str] = field(default_factory=dict)
    misfits: dict[int, str] = field(default_factory=dict)


def run_loader(skeleton: Skeleton, sources: ParamTable, live: Mapping[str, torch.Tensor]) -> Recording | None:
    """Run the loader on tensors without data; leave out a source that it raises on, and run it again.

    Returns:
        The recording, or None where the loader keeps raising, whatever is left out.
    """
    refused: dict[int, str] = {}
    misfits: dict[int, str] = {}
    for _ in range(MAX_RUNS):
        run = _Run(skeleton, sources, live)
        culprits = run.attempt(refused)
        misfits |= {id_: why for id_, why in culprits.items() if run.misfit}
        if not culprits:
            return replace(run.result(refused), misfits=misfits)
        if not culprits.keys() - refused.keys():
            break
        refused |= culprits
        refused |= _same_pattern(sources, refused)
    return None


class _Run:
    """One run of the loader with a recorder of its own."""

    def __init__(self, skeleton: Skeleton, sources: ParamTable, live: Mapping[str, torch.Tensor]) -> None:
        self._skeleton, self._sources = skeleton, sources
        self._metas = _source_tensors(sources)
        self._recorder = Recorder()
        self._aliases: dict[str, str] = {}
        self._unusable: dict[str, str] = {}
        self.misfit = False
        self._yielded = -1
        self._exhausted = False
        for id_, meta in enumerate(self._metas):
            self._recorder.add_source(id_, meta)
        self._add_targets(live)
        for name, tensor in live.items():
            self._recorder.guard(name, tensor)
        self._kept = {name: tensor.data for name, tensor in skeleton.tensors.items()}

    def _add_targets(self, live: Mapping[str, torch.Tensor]) -> None:
        """Follow every destination once; of several names of one memory the first live one counts."""
        owners: dict[int, str] = {}
        for name, tensor in sorted(self._skeleton.tensors.items(), key=lambda item: item[0] not in live):
            owner = owners.setdefault(tensor.untyped_storage()._cdata, name)
            if owner == name:
                self._recorder.add_target(name, tensor)
            elif _same_view(tensor, self._skeleton.tensors[owner]):
                self._aliases[name] = owner
            else:
                self._unusable |= dict.fromkeys((name, owner), f"{name} and {owner} are parts of one memory")

    def attempt(self, left_out: Mapping[int, str]) -> dict[int, str]:
        """Run the loader once; returns the sources it raised on, none where it did not raise."""
        try:
            with _inline_pools(), recording(self._recorder):
                self._skeleton.load(self._pairs(left_out))
        except Exception as error:
            culprits = self._blame(error)
            self.misfit = _is_misfit(error)
            logger.debug("the loader raised on %s", [self._sources[i].name for i in culprits], exc_info=error)
            return dict.fromkeys(culprits, f"the loader raised {type(error).__name__}: {error}")
        finally:
            self._restore()
        return {}

    def result(self, refused: dict[int, str]) -> Recording:
        asked = dict.fromkeys(self._recorder.asked, "the loader looks at its values")
        return Recording(
            self._recorder, self._aliases, asked | refused, self._recorder.leftovers(), self._unusable
        )

    def _pairs(self, left_out: Mapping[int, str]) -> Iterator[tuple[str, torch.Tensor]]:
        for id_, meta in enumerate(self._sources):
            if id_ not in left_out:
                self._yielded = id_
                yield meta.name, self._metas[id_]
        self._exhausted = True

    def _blame(self, error: Exception) -> set[int]:
        """Return the sources that an exception is about: whose data was asked for, or that came last."""
        if isinstance(error, DataNeededError) and error.sources:
            return set(error.sources)
        if self._exhausted and self._recorder.last_feeds:
            return set(self._recorder.last_feeds)
        return {max(self._yielded, 0)}

    def _restore(self) -> None:
        """Undo `param.data = ...`; such a target cannot be recorded, its memory would not be the live one."""
        for name, data in self._kept.items():
            tensor = self._skeleton.tensors[name]
            moved = tensor.untyped_storage()._cdata != data.untyped_storage()._cdata
            if moved or not _same_view(tensor, data):
                self._unusable[name] = "the loader replaced the tensor"
                surface = self._recorder.targets.get(name)
                if surface is not None:
                    surface.breaks(self._unusable[name], self._recorder.feeds_of(tensor))
                tensor.data = data


def _is_misfit(error: Exception) -> bool:
    """Return whether an error is about a name or a shape, and so would come with data too."""
    if isinstance(error, AssertionError) and not error.args:
        return True
    text = str(error).lower()
    if isinstance(error, KeyError | ValueError):
        return "meta" not in text
    return isinstance(error, AssertionError | RuntimeError | IndexError) and (
        _SHAPE_WORDS.search(text) is not None and "meta" not in text
    )


def _source_tensors(sources: ParamTable) -> list[torch.Tensor]:
    return [torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device=META) for meta in sources]


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    key_a, key_b = ((t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (a, b))
    return key_a == key_b


def _same_pattern(sources: ParamTable, refused: Mapping[int, str]) -> dict[int, str]:
    """Return sources named like two refused ones but for numbers: layers are alike."""
    counts: dict[str, list[int]] = {}
    for id_ in refused:
        counts.setdefault(_pattern(sources[id_].name), []).append(id_)
    repeated = {pattern: refused[ids[0]] for pattern, ids in counts.items() if len(ids) > 1}
    if not repeated:
        return {}
    named = ((id_, _pattern(meta.name)) for id_, meta in enumerate(sources))
    return {id_: repeated[pattern] for id_, pattern in named if pattern in repeated and id_ not in refused}


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


@contextmanager
def _inline_pools() -> Iterator[None]:
    """Make thread pools of this thread run their work at once: modes do not follow into other threads."""
    owner, submit = get_ident(), ThreadPoolExecutor.submit

    def submit_inline(
        pool: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: object, **kwargs: object
    ) -> Future[Any]:
        if get_ident() != owner:
            return submit(pool, fn, *args, **kwargs)
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - a future carries whatever the work raised
            future.set_exception(error)
        return future

    ThreadPoolExecutor.submit = submit_inline  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]
