"""Stands in for SGLang's kernels on a CPU without AMX: every name imports, every call raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__version__ = "0.0.0+none"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: object, **_options: object) -> Any:
        message = f"sgl_kernel.{name} is not there: this machine has no kernels of SGLang"
        raise RuntimeError(message)

    missing.__name__ = name
    return missing
