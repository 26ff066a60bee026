"""Holders as torchrun ranks: rank 0 leads the update, every rank (0 too) holds its part of the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.config import HostSettings, host_settings
from headrace.errors import ConfigError, ConnectError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from headrace.holder import HolderTicket

TICKET_WAIT_S = 900.0
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Launch:
    """What torchrun told this process."""

    rank: int
    world_size: int
    master_address: str
    master_port: int

    def store(self) -> TCPStore:
        """Dial the store that torchrun's agent keeps.

        Raises:
            ConnectError: It cannot be reached.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined] # noqa: PLC0415 - few are torchrun's

        try:
            return TCPStore(
                self.master_address,
                self.master_port,
                is_master=False,
                timeout=timedelta(seconds=TICKET_WAIT_S),
            )
        except RuntimeError as error:
            address = f"{self.master_address}:{self.master_port}"
            message = f"torchrun's store at {address} cannot be reached: {error}"
            raise ConnectError(message, name=address) from error

    def hand_out(self, tickets: Sequence[HolderTicket]) -> None:
        """Give every rank its ticket; by rank 0."""
        store = self.store()
        for ticket in tickets:
            store.set(f"headrace/ticket/{ticket.index}", json.dumps(asdict(ticket)))


def launched_by_torchrun(environ: Mapping[str, str] | None = None) -> Launch | None:
    """Return how torchrun started this process, or None where it did not.

    Raises:
        ConfigError: Its variables make no sense.
    """
    env = os.environ if environ is None else environ
    if "TORCHELASTIC_RUN_ID" not in env:
        return None
    try:
        rank, world_size, address, port = (env[name] for name in _VARIABLES)
        return Launch(int(rank), int(world_size), address, int(port))
    except (KeyError, ValueError) as error:
        message = f"torchrun's variables {', '.join(_VARIABLES)} are incomplete: {error}"
        raise ConfigError(message) from None


def hold_as_rank(launch: Launch, checkpoint: Path, host: HostSettings | None = None) -> None:
    """Hold this rank's part until rank 0 ends; blocking.

    Raises:
        ConnectError: Rank 0 gave no ticket.
    """
    from headrace.holder import Holder, HolderTicket  # noqa: PLC0415 - torch, as above
    from headrace.store.checkpoint import CheckpointSource  # noqa: PLC0415

    try:
        ticket = HolderTicket(**json.loads(launch.store().get(f"headrace/ticket/{launch.rank}")))
    except RuntimeError as error:
        message = f"rank 0 gave rank {launch.rank} no ticket within {TICKET_WAIT_S:.0f} s: {error}"
        raise ConnectError(message, rank=launch.rank) from error
    source = CheckpointSource(str(checkpoint), parts=launch.world_size, part=launch.rank)
    Holder(source, ticket, host or host_settings()).run()
