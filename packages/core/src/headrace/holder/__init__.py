"""The holder role: a source's weights in this host's memory, lent to receivers, served over TCP, broadcast in rings."""

from headrace.holder.holder import Holder, HolderTicket

__all__ = ["Holder", "HolderTicket"]
