"""Receivers of the models in this process: one per model, made when its first ticket arrives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import nn

from headrace.config import host_settings
from headrace.errors import CapacityError
from headrace.protocols import InferenceBackend
from headrace.receiver import Receiver

logger = logging.getLogger(__name__)
_receivers: WeakKeyDictionary[nn.Module, Receiver] = WeakKeyDictionary()
_reserved: dict[torch.device, torch.Tensor] = {}


def reserve(model: nn.Module) -> None:
    """Take `HEADRACE_STAGING_GIB` of the model's GPU for staging, once; call it before the engine sizes its KV cache.

    Raises:
        CapacityError: The GPU has less.
    """
    device, num_bytes = _gpu_of(model), host_settings().staging_bytes
    if device is None or not num_bytes or device in _reserved:
        return
    try:
        _reserved[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        message = f"{device} has no {num_bytes / 2**30:.1f} GiB for staging: {error}; lower HEADRACE_STAGING_GIB"
        raise CapacityError(message, name="HEADRACE_STAGING_GIB") from error
    logger.info("%.1f GiB of %s are reserved for staging weights", num_bytes / 2**30, device)


def receiver_of(model: nn.Module, make_backend: Callable[[], InferenceBackend]) -> Receiver:
    """Return the receiver of a worker's model, made with a backend where there is none yet; starts nothing."""
    receiver = _receivers.get(model)
    if receiver is None:
        device = _gpu_of(model)
        receiver = _receivers[model] = Receiver(make_backend(), _reserved.get(device) if device else None)
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


def _gpu_of(model: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in model.parameters() if tensor.is_cuda), None)
