"""BroadcastGroup: a gloo communicator of the holders, beside whatever process group the application has."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import distributed as dist

from headrace.errors import ConnectError, PeerLostError


class BroadcastGroup:
    """Members that broadcast buffers to each other; made once and kept over updates.

    Collective: every member constructs it with the same store and world size, and calls `broadcast` in the same
    order. The application's default process group is neither needed nor touched.

    Args:
        store: `host:port` of a TCPStore that outlives the group.
        rank: This member.
        world_size: Number of members.
        deadline_s: Limit for joining and for each broadcast.
    """

    def __init__(self, store: str, rank: int, world_size: int, deadline_s: float) -> None:

        host, _, port = store.rpartition(":")
        limit = timedelta(seconds=deadline_s)
        self.store = store
        self.world_size = world_size
        try:
            self._store = dist.TCPStore(host, int(port), is_master=False, timeout=limit)  # type: ignore[attr-defined]
            self._group = dist.ProcessGroupGloo(self._store, rank, world_size, limit)
        except (RuntimeError, ValueError) as error:
            message = f"member {rank} of {world_size} could not join the broadcast group at {store}: {error}"
            raise ConnectError(message, name=store, rank=rank) from error

    def broadcast(self, buffer: torch.Tensor, root: int) -> None:
        """Make `buffer` on every member equal to the root's. Collective; blocks.

        Raises:
            PeerLostError: A member died or did not come within the deadline; the group cannot be used any more.
        """
        options = dist.BroadcastOptions()
        options.rootRank = root
        try:
            self._group.broadcast([buffer], options).wait()  # type: ignore[attr-defined]
        except RuntimeError as error:
            message = f"the broadcast from member {root} broke: {error}"
            raise PeerLostError(message, rank=root) from error


def serve_store(host: str) -> tuple[object, str]:
    """Open a rendezvous store on a free port; returns it (keep it alive) and its `host:port`."""
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    return store, f"{host}:{store.port}"
