"""Receivers of the models in this process: one per model, made when its first ticket arrives."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import nn

from headrace.protocols import InferenceBackend
from headrace.receiver import Receiver

_receivers: WeakKeyDictionary[nn.Module, Receiver] = WeakKeyDictionary()


def receiver_of(model: nn.Module, make_backend: Callable[[], InferenceBackend]) -> Receiver:
    """Return the receiver of a worker's model, made with a backend where there is none yet; starts nothing."""
    receiver = _receivers.get(model)
    if receiver is None:
        receiver = _receivers[model] = Receiver(make_backend())
    return receiver


def hold(update_id: str, deadline_s: float) -> int | None:
    """Stand still in the receiver that takes part in an update; returns the version that was taken, or None.

    Called on the worker's own thread, see `Receiver.hold`; returns at once where no receiver here takes part.
    """
    taken = (receiver.hold(update_id, deadline_s) for receiver in list(_receivers.values()))
    return next((version for version in taken if version is not None), None)


def leave(model: nn.Module) -> None:
    """End a model's receiver, if it has one; a running update fails."""
    receiver = _receivers.pop(model, None)
    if receiver is not None:
        receiver.close()
