"""The reload life cycle of modules whose weights the engine rewrote: loader's layout, loader, kernel's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class ModuleReload:
    """One run of the life cycle: `begin`, the engine's loader, `end`; the engine is paused.

    Needs memory for a second copy of the modules' parameters between `begin` and `end`.

    Args:
        restore: Gives a module parameters in the loader's layout: new ones, the old stay as they are.
        process: Has the engine process what was loaded.
    """

    def __init__(self, restore: Callable[[nn.Module], None], process: Callable[[nn.Module], None]) -> None:
        self._restore = restore
        self._process = process
        self._kept: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []

    def begin(self, modules: Sequence[nn.Module]) -> None:
        """Give modules parameters in the loader's layout, and keep those that the kernels read. May be repeated."""
        begun = {id(module) for module, _, _ in self._kept}
        for module in (module for module in modules if id(module) not in begun):
            self._kept.append((module, dict(module._parameters), dict(module._buffers)))
            self._restore(module)

    def end(self) -> None:
        """Process what was loaded, and put it where the kernels have always read it."""
        for module, old, buffers in self._kept:
            self._process(module)
            for name, parameter in old.items():
                _put_back(module, name, parameter)
            module._buffers.update(buffers)
        self._kept = []

    def abandon(self) -> None:
        """Put the old parameters back after a failure; their bytes are still those from before."""
        for module, old, buffers in self._kept:
            module._parameters.clear()
            module._parameters.update(old)
            module._buffers.update(buffers)
        self._kept = []


def _put_back(module: nn.Module, name: str, old: nn.Parameter | None) -> None:
    """Copy the new bytes into the old parameter where they fit, so that pointers which kernels hold stay."""
    new = module._parameters.get(name)
    if old is None or new is None or new is old:
        return
    if (old.shape, old.dtype, old.stride()) == (new.shape, new.dtype, new.stride()):
        old.data.copy_(new.data)
        module._parameters[name] = old
