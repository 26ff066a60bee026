"""Headrace puts new weights into LLM inference engines while they serve."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.config import Deadlines, UpdateSettings
    from headrace.errors import HeadraceError, UpdateFailedError
    from headrace.receiver import Receiver
    from headrace.report import UpdateReport, WorkerReport
    from headrace.server.parameter_server import ParameterServer

__all__ = [
    "Deadlines",
    "HeadraceError",
    "ParameterServer",
    "Receiver",
    "UpdateFailedError",
    "UpdateReport",
    "UpdateSettings",
    "WorkerReport",
]

_MODULES = {
    "Deadlines": "config",
    "HeadraceError": "errors",
    "ParameterServer": "server.parameter_server",
    "Receiver": "receiver",
    "UpdateFailedError": "errors",
    "UpdateReport": "report",
    "UpdateSettings": "config",
    "WorkerReport": "report",
}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is first used: Mooncake's helpers do without numpy, others without torch."""
    if name not in _MODULES:
        message = f"module 'headrace' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"headrace.{_MODULES[name]}"), name)
