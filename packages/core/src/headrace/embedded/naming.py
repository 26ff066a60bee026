"""From checkpoint names to the model's tensors, by transformers' own rules for the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from headrace.errors import ApplyError


@dataclass(frozen=True, slots=True)
class Landing:
    """The part of a model tensor that one checkpoint tensor fills.

    Attributes:
        target: The model's name of the tensor.
        item: Index along dim 0 where the model stacks what the checkpoint has one by one (experts).
        part: Which of `num_parts` equal parts along `dim`, where the model joins several tensors.
        num_parts: Number of parts; 1 where nothing is joined.
        dim: Dim of the target along which parts are joined.
        grouped: The tensor has no place of its own; transformers converts the whole group.
    """

    target: str
    item: int | None = None
    part: int = 0
    num_parts: int = 1
    dim: int = 0
    grouped: bool = False


class CheckpointNaming:
    """The naming and conversion rules that `from_pretrained` applies to this model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        self.landing = cache(self._landing)

    @cached_property
    def _state(self) -> dict[str, Any]:
        return dict(self._model.state_dict(keep_vars=True))

    def _landing(self, name: str) -> Landing | None:
        """Return where a checkpoint tensor goes, or None where the model has nothing of that name."""
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if target not in self._state:
            target, pattern = rename_source_key(name, [], [], prefix, self._state)
        if target not in self._state:
            return None
        return Landing(target) if pattern is None else self._converted(name, target, pattern)

    def _converted(self, name: str, target: str, pattern: str) -> Landing:
        converter = self._by_pattern[pattern]
        stacks, joins, rest = _sorted_operations(converter)
        item = _item_index(name, pattern) if stacks else None
        if rest or len(converter.target_patterns) > 1 or (stacks and item is None):
            return Landing(target, grouped=True)
        if not joins:
            return Landing(target, item=item)
        part, num_parts = converter.source_patterns.index(pattern), len(converter.source_patterns)
        if num_parts > 2:
            return Landing(target, grouped=True)
        dim = joins[0].dim % self._state[target].ndim
        return Landing(target, item=item, part=part, num_parts=num_parts, dim=dim)

    def convert(self, group: Sequence[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Convert a complete group of checkpoint tensors that share a target, as `from_pretrained` would.

        Raises:
            ApplyError: The group is incomplete, or transformers cannot convert it.
        """
        ordered = sorted(group, key=lambda pair: dot_natural_key(pair[0]))
        prefix = self._model.base_model_prefix
        target, converter = "", None
        for name, tensor in ordered:
            target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
            if pattern is None:
                raise ApplyError(
                    f"{name} has no conversion to {target} in this version of transformers", name=name
                )
            converter = converter or deepcopy(self._by_pattern[pattern])
            converter.add_tensor(target, name, pattern, lambda tensor=tensor: tensor)
        if converter is None:
            return
        try:
            made = converter.convert(target, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            names = ", ".join(name for name, _ in ordered[:4])
            raise ApplyError(f"cannot convert {names} to {target}: {error}", name=target) from error
        for full_name, value in made.items():
            yield full_name, value[0] if isinstance(value, list) else value


def _sorted_operations(converter: WeightConverter) -> tuple[list[Any], list[Any], list[Any]]:
    """Split a converter's operations: stacking along dim 0, joining, and whatever has no fixed place."""
    stacks = [op for op in converter.operations if type(op) is MergeModulelist and op.dim == 0]
    joins = [op for op in converter.operations if type(op) is Concatenate]
    known = stacks + joins
    rest = [op for op in converter.operations if op not in known]
    in_order = converter.operations == known and len(stacks) <= 1 and len(joins) <= 1
    return stacks, joins, rest if in_order else [*rest, *known]


def _item_index(name: str, pattern: str) -> int | None:
    """Return the number that stands at the first `*` of a source pattern."""
    expression = re.escape(pattern.lstrip("^")).replace(r"\*", r"(\d+)")
    found = re.search(expression, name)
    return int(found.group(1)) if found and found.groups() else None
