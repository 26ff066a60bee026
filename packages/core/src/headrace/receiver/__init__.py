"""The receiver role: the part of Headrace that lives in an engine worker."""

from headrace.receiver.receiver import Receiver

__all__ = ["Receiver"]
