"""Headrace in SGLang: the inference backend of its workers, and control over its interface.

Importing this imports neither SGLang nor torch; what needs them is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_sglang.control import SglangControl
    from headrace_sglang.offline import attach

__all__ = ["SglangControl", "attach"]

_HOMES = {"SglangControl": "headrace_sglang.control", "attach": "headrace_sglang.offline"}


def __getattr__(name: str) -> object:
    from importlib import import_module  # noqa: PLC0415 - nothing is imported before it is asked for

    if name not in _HOMES:
        message = f"module 'headrace_sglang' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(_HOMES[name]), name)
