"""Headrace puts new weights into LLM inference engines while they serve."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from headrace.config import Deadlines, UpdateSettings
from headrace.errors import HeadraceError, UpdateFailedError
from headrace.report import UpdateReport, WorkerReport

if TYPE_CHECKING:
    from headrace.receiver import Receiver
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

_LAZY = {"ParameterServer": "headrace.server.parameter_server", "Receiver": "headrace.receiver"}


def __getattr__(name: str) -> object:
    """Import the roles, and with them torch and zmq, when they are first used."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    message = f"module 'headrace' has no attribute {name!r}"
    raise AttributeError(message)
