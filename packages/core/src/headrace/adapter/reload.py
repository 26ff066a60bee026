"""The reload life cycle of modules whose weights the engine rewrote: loader's layout, loader, kernel's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headrace.adapter.watch import constructed
from headrace.errors import ApplyError

_UNTOUCHED = {1: (torch.int8, 0x5A), 2: (torch.int16, 0x5A5A), 4: (torch.int32, 0x5A5A5A5A)}
_UNTOUCHED |= {8: (torch.int64, 0x5A5A5A5A5A5A5A5A)}
"""By element size: what new parameters hold until the loader writes them, as an integer dtype and its value."""


@dataclass(slots=True)
class _Begun:
    """A module in its reload: what its kernels read until now, and which parameters the loader must write."""

    module: nn.Module
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    awaited: tuple[str, ...] = ()


class ModuleReload:
    """One run of the life cycle: `begin`, the engine's loader, `end`; `abandon` where one fails. The engine is paused.

    Needs memory for a second copy of the modules' parameters between `begin` and `end`.

    Args:
        restore: Gives a module parameters in the loader's layout: new ones, the old stay as they are.
        process: Has the engine process what was loaded.
    """

    def __init__(self, restore: Callable[[nn.Module], None], process: Callable[[nn.Module], None]) -> None:
        self._restore = restore
        self._process = process
        self._begun: list[_Begun] = []

    def begin(self, modules: Sequence[nn.Module]) -> None:
        """Give modules parameters in the loader's layout, and keep those that the kernels read. May be repeated."""
        known = {id(begun.module) for begun in self._begun}
        for module in (module for module in modules if id(module) not in known):
            begun = _Begun(module, dict(module._parameters), dict(module._buffers))
            # Noted first: `restore` may take the old parameters away and then find no memory for new ones.
            self._begun.append(begun)
            self._restore(module)
            begun.awaited = _fill_new(module, begun.parameters)

    def end(self) -> None:
        """Process what was loaded, and put it where the kernels have always read it.

        Raises:
            ApplyError: The loader left a parameter as it was: what would be processed is no weight.
        """
        for begun in self._begun:
            for name in begun.awaited:
                _check_loaded(begun.module, name)
        for begun in self._begun:
            self._process(begun.module)
            for name, parameter in begun.parameters.items():
                _put_back(begun.module, name, parameter)
            begun.module._buffers.update(begun.buffers)
        self._begun = []

    def abandon(self) -> None:
        """Put the old parameters back after a failure, and let go of the new ones.

        The old ones' bytes are those from before, but where `end` was under way: it may have put new ones there.
        """
        for begun in self._begun:
            for now, old in ((begun.module._parameters, begun.parameters), (begun.module._buffers, begun.buffers)):
                now.clear()
                now.update(old)
        self._begun = []


def _fill_new(module: nn.Module, old: dict[str, Any]) -> tuple[str, ...]:
    """Give new parameters what they were constructed as, or a mark; return the marked: the loader must write them."""
    new = {n: p for n, p in module._parameters.items() if p is not None and p is not old.get(n)}
    values = constructed(module)
    awaited = tuple(n for n, p in new.items() if n not in values and p.element_size() in _UNTOUCHED)
    for name in new.keys() & values.keys():
        new[name].data.copy_(values[name])
    for name in awaited:
        kind, untouched = _UNTOUCHED[new[name].element_size()]
        new[name].data.view(kind).fill_(untouched)
    return awaited


def _check_loaded(module: nn.Module, name: str) -> None:
    parameter: Any = module._parameters[name]
    kind, untouched = _UNTOUCHED[parameter.element_size()]
    if parameter.numel() and not bool((parameter.data.view(kind) != untouched).any()):
        message = (
            f"the engine's loader wrote nothing into {name} of a {type(module).__name__}; choose a quantisation or "
            "kernels that Headrace can reload, or give the engine unquantised weights"
        )
        raise ApplyError(message, name=name, phase="commit")


def _put_back(module: nn.Module, name: str, old: nn.Parameter | None) -> None:
    """Copy the new bytes into the old parameter where they fit, so that pointers which kernels hold stay."""
    new = module._parameters.get(name)
    if old is None or new is None or new is old:
        return
    if (old.shape, old.dtype, old.stride()) == (new.shape, new.dtype, new.stride()):
        old.data.copy_(new.data)
        module._parameters[name] = old
