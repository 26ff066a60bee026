"""What happens in a scheduler: its model's skeleton is taken, and its receiver made when the first ticket arrives."""

from __future__ import annotations

import logging
import time
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from headrace.adapter.receivers import receiver_of, reserve
from headrace.adapter.watch import watch
from headrace_sglang.backend import SglangBackend
from headrace_sglang.door import ticket_of

logger = logging.getLogger(__name__)
_GIVEN_S = 0.0005
_instances: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def constructed(model: nn.Module, *_args: object, **_options: object) -> None:
    """Take a model's skeleton: a hook after its construction, before its weights are loaded."""
    watch(model)
    reserve(model)


def started(_result: None, scheduler: Any, *args: Any, **options: Any) -> None:  # noqa: ANN401
    """Note which engine a scheduler belongs to: a hook after its construction."""
    given = (*args, *options.values())
    _instances[scheduler] = next(each.instance_id for each in given if hasattr(each, "instance_id"))


def give_way(*_args: object) -> None:
    """Leave the interpreter to the receiver's thread: a paused scheduler asks for requests without a break."""
    time.sleep(_GIVEN_S)


def take_ticket(original: Any, updater: Any, request: Any) -> Any:  # noqa: ANN401
    """Enrol this scheduler's receiver, if the request is a ticket: a hook around SGLang's own update.

    Ranks of one tensor-parallel group first agree that all of them can: a ticket is taken by all or by none.
    """
    ticket = ticket_of(request.zmq_handles)
    if ticket is None:
        return original(updater, request)
    from sglang.srt.managers.io_struct import UpdateWeightsFromIPCReqOutput  # noqa: PLC0415

    receiver, problem = None, ""
    try:
        receiver = _receiver(updater)
    except Exception as error:  # noqa: BLE001 - a scheduler dies of what leaves its handlers
        logger.warning("update %s cannot be taken: %s", ticket.update_id, error)
        problem = f"{type(error).__name__}: {error}"
    problems = _gathered(updater, problem)
    if receiver and not problems:
        receiver.enrol(ticket)
    return UpdateWeightsFromIPCReqOutput(success=not problems, message="; ".join(problems))


def _receiver(updater: Any) -> Any:  # noqa: ANN401
    from headrace_sglang.fitness import check_fitness  # noqa: PLC0415

    check_fitness(updater)
    runner, scheduler = updater.tp_worker.model_runner, updater.scheduler
    return receiver_of(
        runner.model, lambda: SglangBackend(scheduler, runner, _instances.get(scheduler, "unnamed"))
    )


def _gathered(updater: Any, problem: str) -> list[str]:  # noqa: ANN401
    """Return the problems of all ranks of the tensor-parallel group, with the rank that has each."""
    group = updater.tp_cpu_group
    said: list[Any] = [""] * torch.distributed.get_world_size(group=group)
    torch.distributed.all_gather_object(said, problem, group=group)
    return [f"rank {rank}: {text}" for rank, text in enumerate(said) if text]
