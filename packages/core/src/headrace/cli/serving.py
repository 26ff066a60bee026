"""A command's parameter server: its holder processes start before it is imported, as both load torch for seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.server.holder_process import started

if TYPE_CHECKING:
    from headrace.server.parameter_server import ParameterServer
    from headrace.server.torchrun import Launch


@contextmanager
def serving(checkpoint: Path, holders: int | None, launch: Launch | None = None) -> Iterator[ParameterServer]:
    """Yield the server of a checkpoint; everything that was started for it ends with the body.

    Args:
        checkpoint: Folder or file.
        holders: Number of holders, where the user gave it.
        launch: Processes that hold instead, where torchrun has started them.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    with started(0 if launch else holders or 1) as processes:
        from headrace.server.parameter_server import ParameterServer

        with ParameterServer(checkpoint, holders=holders, launch=launch) as server:
            server.holders.spares += processes
            yield server
