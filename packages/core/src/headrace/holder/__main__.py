"""A holder's process: `python -m headrace.holder`; what it holds comes on stdin, whose end is its own."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from contextlib import suppress

import torch

from headrace import wire
from headrace.config import HostSettings
from headrace.control.dialer import Dialer
from headrace.errors import ConfigError, HeadraceError, RemoteFailure
from headrace.holder.holder import Holder, HolderTicket
from headrace.protocols import WeightSource
from headrace.store.checkpoint import CheckpointSource
from headrace.store.tensors import TensorSource

logger = logging.getLogger("headrace.holder")
GIVE_UP_S = 60.0


def source_from(spec: dict[str, object]) -> WeightSource:
    """Build a spawned holder's source: a part of a checkpoint, or nothing (a relay that only broadcasts)."""
    if spec.get("checkpoint"):
        return CheckpointSource(
            str(spec["checkpoint"]), parts=int(str(spec["parts"])), part=int(str(spec["part"]))
        )
    return TensorSource({})


def _give_up(ticket: HolderTicket, error: HeadraceError) -> None:
    """Dial in only to say why this holder cannot be, and wait until that is heard."""
    with Dialer(ticket.endpoint, ticket.server_key) as dialer:
        dialer.send(wire.HolderHello(token=ticket.token, index=ticket.index, pid=os.getpid()))
        dialer.send(wire.Failed(failure=RemoteFailure.of(error, phase="read")))
        with suppress(HeadraceError):
            dialer.receive(GIVE_UP_S)


def _leave_with_parent(holder: Holder) -> None:
    """End this process when stdin closes: the parent holds the other end for its whole life."""
    sys.stdin.read()
    holder.withdraw()
    os._exit(0)


def main() -> None:
    """Run a holder whose ticket, source and host come as one JSON line on stdin; none comes where it is not needed."""
    line = sys.stdin.readline()
    if not line:
        return
    spec = json.loads(line)
    logging.basicConfig(level=spec.get("log_level", "WARNING"))
    torch.set_num_threads(1)
    ticket = HolderTicket(**spec["ticket"])
    try:
        holder = Holder(source_from(spec), ticket, HostSettings.of_plain(spec["host"]))
    except HeadraceError as error:
        _give_up(ticket, error)
        return
    threading.Thread(target=_leave_with_parent, args=(holder,), daemon=True).start()
    code = 0
    try:
        holder.run()
    except ConfigError as error:
        _give_up(ticket, error)
    except HeadraceError as error:
        logger.error("%s ends: %s", holder.name, error)  # noqa: TRY400 - the message says it all
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
