"""Ways to read a holder's segments: memory of the same host, TCP from everywhere."""

from headrace.transports.memory import MemoryTransport
from headrace.transports.program import CopyProgram
from headrace.transports.tcp import TcpTransport
from headrace.transports.tcp_server import TcpServer

__all__ = ["CopyProgram", "MemoryTransport", "TcpServer", "TcpTransport"]
