"""Part: one model of a worker - the one that answers, or a draft model of speculative decoding beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from headrace.adapter.modules import bare_name, loadable, parameters
from headrace.adapter.watch import processed, was_rewritten
from headrace.errors import HeadraceError
from headrace.protocols import NamedTensors, Skeleton
from headrace.recording import record
from headrace.types import ParamTable

logger = logging.getLogger(__name__)


class Part:
    """One model as its receiver sees it: live tensors and structure by names, and the modules that were rewritten.

    Args:
        model: The model.
        twin: The same as it was constructed, on the meta device.
        prefix: What its tensors' names begin with; empty for the model that answers.
        follows: Whether updates are for it too: a draft of another checkpoint has nothing to do with them.
        others: Ids of the parameters of the model that answers; what a draft shares with it is that one's alone.
    """

    def __init__(
        self,
        model: nn.Module,
        twin: nn.Module,
        prefix: str = "",
        *,
        follows: bool = True,
        others: Collection[int] = frozenset(),
    ) -> None:
        self.model: Any = model
        self.prefix = prefix
        self.follows = follows
        self.twin: Any = twin
        named = model.named_parameters(remove_duplicate=False)
        self._shared = frozenset(name for name, tensor in named if id(tensor) in others)
        parameter: Any
        for name, parameter in twin.named_parameters(remove_duplicate=False):
            if name in self._shared:
                parameter.weight_loader = _ignore
        self._fed_by: set[str] = set()

    def context(self) -> AbstractContextManager[object]:
        """Return what the model's loader and post-processing must run in. The engine's own."""
        return nullcontext()

    def live(self) -> dict[str, torch.Tensor]:
        """Return its own live tensors, without those that it shares with the model that answers."""
        return self._own(self.model)

    def structure(self) -> dict[str, torch.Tensor]:
        """Return the same as they were constructed."""
        return self._own(self.twin)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return its own live parameters."""
        return self._own(self.model, parameters)

    def is_parameter(self, name: str) -> bool:
        """Return whether a name is that of a parameter, and not of a buffer."""
        return name.removeprefix(self.prefix) in parameters(self.twin)

    def load(self, pairs: NamedTensors) -> None:
        """Run the loader on the live model."""
        with self.context():
            self.model.load_weights(iter(pairs))

    def load_twin(self, pairs: NamedTensors) -> object:
        """Run the loader on the structure."""
        with self.context():
            return self.twin.load_weights(pairs)

    def wants(self, sources: ParamTable, derived: Mapping[str, Sequence[str]]) -> bool:
        """Return whether a source fills this draft, all of it; notes which of its parameters do.

        Args:
            sources: The source's parameters.
            derived: What the engine computes itself, by the names of tensors.
        """
        if not self.follows:
            return False
        try:
            alone = record(
                Skeleton(self.structure(), self.load_twin),
                sources,
                live=None,
                reload_unit=lambda name: name,
                optional=lambda name: not self.is_parameter(name),
                derived=derived,
                can_rederive=True,
            )
        except HeadraceError as error:
            logger.info("the draft model stays as it is: %s", error)
            return False
        if not len(alone.regions):
            return False
        used = {*alone.regions.param.tolist(), *alone.opaque.tolist()}
        self._fed_by |= {sources[i].name for i in used}
        return True

    def is_fed_by(self, names: Collection[str]) -> bool:
        """Return whether some source that was seen to fill this draft is among `names`."""
        return not self._fed_by.isdisjoint(names)

    def twin_of(self, module: nn.Module) -> nn.Module | None:
        """Return a module as it was constructed, or None where it is not this model's."""
        path = next((path for path, own in self._paths() if own is module), None)
        twin: nn.Module | None = None if path is None else self.twin.get_submodule(path)
        return twin

    def rewritten(self) -> list[nn.Module]:
        """Return modules whose parameters are not what the loader wrote, outermost first."""
        twins = dict(self.twin.named_modules())
        return [
            module
            for path, module in self._paths()
            if getattr(module, "quant_method", None) is not None and was_rewritten(module, twins.get(path))
        ]

    def deriving(self) -> list[tuple[str, nn.Module]]:
        """Return modules that hold something computed from parameters that are still the loader's."""
        notes = ((path, module, processed(module)) for path, module in self.modules())
        return [(path, module) for path, module, note in notes if note and note.keeps and not note.rewrote]

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Return all modules by the names that their tensors begin with."""
        return [(self.prefix + path, module) for path, module in self._paths()]

    def _paths(self) -> list[tuple[str, nn.Module]]:
        """Return all modules by their paths in the twin, which has none of LoRA's wrappers."""
        return [
            (bare_name(f"{path}.").rstrip("."), module) for path, module in self.model.named_modules()
        ]

    def _own(
        self, model: nn.Module, tensors: Callable[[nn.Module], dict[str, torch.Tensor]] = loadable
    ) -> dict[str, torch.Tensor]:
        found = tensors(model)
        return {self.prefix + name: tensor for name, tensor in found.items() if name not in self._shared}


def is_of_draft(name: str) -> bool:
    """Return whether a tensor is a draft model's; modules' own names have no slash."""
    return "/" in name


def _ignore(*_args: object, **_kwargs: object) -> bool:
    """Be the loader of a draft's parameter that the engine has exchanged for the answering model's."""
    return True
