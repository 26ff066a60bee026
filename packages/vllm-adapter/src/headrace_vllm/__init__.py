"""Headrace in vLLM: the inference backend of its workers, and control over its interfaces.

Importing this imports neither vLLM nor torch; what needs them is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_vllm.control import VllmControl
    from headrace_vllm.extension import WorkerExtension
    from headrace_vllm.offline import attach

__all__ = ["VllmControl", "WorkerExtension", "attach"]

_HOMES = {
    "VllmControl": "headrace_vllm.control",
    "WorkerExtension": "headrace_vllm.extension",
    "attach": "headrace_vllm.offline",
}


def __getattr__(name: str) -> object:
    from importlib import import_module  # noqa: PLC0415 - nothing is imported before it is asked for

    if name not in _HOMES:
        message = f"module 'headrace_vllm' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(_HOMES[name]), name)
