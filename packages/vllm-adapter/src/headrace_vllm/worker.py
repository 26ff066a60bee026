"""What both registrations share: a worker's one receiver, made when the first ticket arrives."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import vllm
from torch import nn

from headrace.protocols import Ticket
from headrace.receiver import Receiver
from headrace_vllm.backend import VllmBackend
from headrace_vllm.versions import check_version

_receivers: WeakKeyDictionary[nn.Module, Receiver] = WeakKeyDictionary()


def enrol(vllm_config: Any, device: torch.device, model: nn.Module, ticket: Ticket) -> None:  # noqa: ANN401
    """Hand a ticket to the receiver of the worker that owns `model`; returns at once.

    Raises:
        BackendUnavailableError: This vLLM is not known, or the model was built without the plug-in.
    """
    receiver = _receivers.get(model)
    if receiver is None:
        check_version(vllm.__version__)
        receiver = _receivers[model] = Receiver(VllmBackend(vllm_config, device, model))
    receiver.enrol(ticket)


def leave(model: nn.Module) -> None:
    """End a worker's receiver, if it has one; a running update fails."""
    receiver = _receivers.pop(model, None)
    if receiver is not None:
        receiver.close()
