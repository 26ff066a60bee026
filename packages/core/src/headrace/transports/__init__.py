"""Ways to read a holder's segments: memory of the same host, TCP from everywhere, Mooncake where it is installed.

What is named here is imported when it is asked for: helper processes do without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.transports.memory import MemoryTransport
    from headrace.transports.program import CopyProgram
    from headrace.transports.tcp import TcpTransport
    from headrace.transports.tcp_server import TcpServer

__all__ = ["CopyProgram", "MemoryTransport", "TcpServer", "TcpTransport"]

_MODULES = {
    "CopyProgram": "program",
    "MemoryTransport": "memory",
    "TcpServer": "tcp_server",
    "TcpTransport": "tcp",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
