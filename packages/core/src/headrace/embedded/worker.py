"""One worker process of the embedded engine: loads its part of the model and obeys the front."""

from __future__ import annotations

import logging
import os
import sys
from functools import singledispatchmethod
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from headrace.embedded.backend import TorchBackend
from headrace.embedded.messages import (
    Command,
    Done,
    DropCaches,
    Enrol,
    Exit,
    Failed,
    Fingerprints,
    GetFingerprints,
    GetStatus,
    Ready,
    Reply,
    Startup,
    Step,
    WorkerStatus,
    decode_command,
    decode_startup,
    encode,
)
from headrace.embedded.model import join_group, load_model, own_memory, stop_tokens, torch_device
from headrace.embedded.stepper import Stepper
from headrace.errors import RemoteFailure
from headrace.types import WorkerId

if TYPE_CHECKING:
    from headrace.receiver import Receiver

_logger = logging.getLogger(__name__)


class Worker:
    """The state of one worker process; commands arrive one at a time."""

    def __init__(self, startup: Startup) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        device = torch_device(startup)
        join_group(startup)
        self._rank = startup.rank
        self._model = load_model(startup, device)
        own_memory(self._model)
        dummy = startup.load_format == "dummy"
        self._backend = TorchBackend(
            self._model,
            WorkerId(startup.instance, startup.rank),
            world_size=startup.world_size,
            source=None if dummy else startup.model,
            version=None if dummy else 0,
        )
        self._stepper = Stepper(self._model, self._backend, device, samples=startup.rank == 0)
        self._receiver: Receiver | None = None

    def ready(self) -> Ready:
        """Return what the front must know of the model."""
        config = self._model.config
        limit = getattr(config, "max_position_embeddings", None) or 1 << 20
        return Ready(config.vocab_size, limit, stop_tokens(self._model))

    @singledispatchmethod
    def obey(self, command: Command) -> Reply:
        """Carry out one command."""
        raise TypeError(f"no command is of {type(command)}")

    @obey.register
    def _(self, command: Step) -> Reply:
        return self._stepper.step(command)

    @obey.register
    def _(self, command: DropCaches) -> Reply:  # noqa: ARG002 - dispatched by type
        self._stepper.drop_caches()
        return Done()

    @obey.register
    def _(self, command: Enrol) -> Reply:
        if self._receiver is None:
            from headrace.receiver import Receiver  # noqa: PLC0415 - an engine that is never updated needs none

            self._receiver = Receiver(self._backend)
        self._receiver.enrol(command.ticket)
        return Done()

    @obey.register
    def _(self, command: GetStatus) -> Reply:  # noqa: ARG002
        seen = self._backend.seen
        state = self._receiver.weights_state if self._receiver else "old"
        return WorkerStatus(
            self._rank, os.getpid(), state, seen.version, seen.epoch, self._stepper.num_caches
        )

    @obey.register
    def _(self, command: GetFingerprints) -> Reply:  # noqa: ARG002
        return Fingerprints(self._rank, self._backend.fingerprints())

    def close(self) -> None:
        """Close the receiver and leave the process group."""
        if self._receiver is not None:
            self._receiver.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def main(descriptor: int) -> NoReturn:
    """Serve the front at the other end of a socket pair until it says so or is gone; never returns."""
    front = Connection(descriptor)
    try:
        _serve(front, decode_startup(front.recv_bytes()))
    except (EOFError, ConnectionError):
        _leave(1)
    _leave(0)


def _serve(front: Connection, startup: Startup) -> None:
    try:
        worker = Worker(startup)
    except Exception as error:  # noqa: BLE001 - the rank boundary: the front must hear of every failure
        front.send_bytes(encode(Failed(startup.rank, RemoteFailure.of(error, phase="start"))))
        front.recv_bytes()
        return
    front.send_bytes(encode(worker.ready()))
    while not isinstance(command := decode_command(front.recv_bytes()), Exit):
        try:
            reply = worker.obey(command)
        except Exception as error:
            _logger.exception("worker %d failed", startup.rank)
            reply = Failed(startup.rank, RemoteFailure.of(error))
        front.send_bytes(encode(reply))
    worker.close()


def _leave(code: int) -> NoReturn:
    """End at once: the interpreter's own exit can abort in gloo's threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
