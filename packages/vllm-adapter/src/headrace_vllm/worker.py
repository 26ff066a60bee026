"""What both registrations share: a worker's one receiver, made when the first ticket arrives."""

from __future__ import annotations

from typing import Any

import torch
import vllm
from torch import nn

from headrace.adapter.receivers import leave, receiver_of
from headrace.protocols import Ticket
from headrace_vllm.backend import VllmBackend
from headrace_vllm.versions import check_version

__all__ = ["enrol", "leave"]


def enrol(vllm_config: Any, device: torch.device, model: nn.Module, ticket: Ticket) -> None:  # noqa: ANN401
    """Hand a ticket to the receiver of the worker that owns `model`; returns at once.

    Raises:
        BackendUnavailableError: This vLLM is not known, or the model was built without the plug-in.
    """
    check_version(vllm.__version__)
    receiver_of(model, lambda: VllmBackend(vllm_config, device, model)).enrol(ticket)
