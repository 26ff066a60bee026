"""Broadcast groups: a communicator of the holders, beside whatever process group the application has."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch
from torch import distributed as dist

from headrace.errors import (
    BackendUnavailableError,
    ConnectError,
    HeadraceError,
    PeerLostError,
    TransferTimeoutError,
)

logger = logging.getLogger(__name__)
ABORT_S = 5.0
_FIRST_BYTES = 1 << 20


class BroadcastGroup(Protocol):
    """Members that broadcast buffers to each other; made once and kept over updates.

    Collective: every member makes it with the same store and world size, and calls `broadcast` in the same order.
    The application's default process group is neither needed nor touched.
    """

    @property
    def place(self) -> tuple[str, int, torch.device | None]:
        """Store, number of members, and the GPU whose memory this member broadcasts; None for host memory."""
        ...

    def broadcast(self, buffer: torch.Tensor, root: int) -> None:
        """Make `buffer` on every member equal to the root's; on a GPU only enqueue that on the current stream.

        Raises:
            PeerLostError: A member died or did not come within the deadline; the group cannot be used any more.
        """
        ...

    def close(self) -> None:
        """Leave, whatever the others do: what was enqueued ends without a result. Idempotent; any thread."""
        ...


class Alone:
    """The group of one member on a GPU: what it would broadcast is in place."""

    def __init__(self, store: str, device: torch.device) -> None:
        self.place = (store, 1, device)

    def broadcast(self, buffer: torch.Tensor, root: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class GlooGroup:
    """A group over host memory; `broadcast` blocks.

    Args:
        store: `host:port` of a TCPStore that outlives the group.
        rank: This member.
        world_size: Number of members.
        deadline_s: Limit for joining and for each broadcast.

    Raises:
        ConnectError: The group could not be joined.
    """

    def __init__(self, store: str, rank: int, world_size: int, deadline_s: float) -> None:
        limit = timedelta(seconds=deadline_s)
        self.place = (store, world_size, None)
        try:
            self._store = _dial(store, limit)
            self._group = dist.ProcessGroupGloo(self._store, rank, world_size, limit)
        except (RuntimeError, ValueError) as error:
            raise _not_joined(store, rank, world_size, error) from error

    def broadcast(self, buffer: torch.Tensor, root: int) -> None:
        """Make `buffer` on every member equal to the root's. Blocking."""
        try:
            self._group.broadcast([buffer], _options(root)).wait()  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise _broken(root, error) from error

    def close(self) -> None:
        """Do nothing: the group ends with its last reference, a broadcast under way by its deadline."""


class NcclGroup:
    """A group over memory of one GPU per member; `broadcast` only enqueues.

    Construction connects everybody, first collective included, so that nothing is left of it for an engine's pause.

    Args:
        store: `host:port` of a TCPStore that outlives the group.
        rank: This member.
        world_size: Number of members.
        deadline_s: Limit for joining.
        device: This member's GPU; no two members have the same one.

    Raises:
        BackendUnavailableError: This torch has no NCCL.
        ConnectError: The group could not be joined.
        TransferTimeoutError: Not all members came within the deadline.
    """

    def __init__(
        self, store: str, rank: int, world_size: int, deadline_s: float, device: torch.device
    ) -> None:
        if not dist.is_nccl_available():
            message = f"torch {torch.__version__} was built without NCCL; install one with it"
            raise BackendUnavailableError(message, name="nccl")
        self.place = (store, world_size, device)
        self._closing = threading.Lock()
        self._closed = False
        limit = timedelta(seconds=deadline_s)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        # The streams of copy programs come from torch's pool of normal priority: a shared one would queue a broadcast
        # behind the next bucket's copies.
        options.is_high_priority_stream = True
        try:
            self._store = dist.PrefixStore("nccl", _dial(store, limit))  # type: ignore[attr-defined]
            with _unwatched():
                self._group = dist.ProcessGroupNCCL(self._store, rank, world_size, options)
        except (RuntimeError, ValueError) as error:
            raise _not_joined(store, rank, world_size, error) from error
        try:
            _within(deadline_s, self._connect, f"member {rank} of {world_size} to join the broadcast group at {store}")
        except RuntimeError as error:
            self.close()
            raise _not_joined(store, rank, world_size, error) from error
        except HeadraceError:
            self.close()
            raise

    def _connect(self) -> None:
        device = self.place[2]
        with torch.cuda.device(device):
            self._group.eager_connect_single_device(device)
            stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                self.broadcast(torch.zeros(_FIRST_BYTES, dtype=torch.uint8, device=device), 0)
            stream.synchronize()

    def broadcast(self, buffer: torch.Tensor, root: int) -> None:
        """Enqueue on the current stream: after what that was given, and before what it is given afterwards."""
        options = _options(root)
        options.asyncOp = False
        try:
            work = self._group.broadcast([buffer], options)  # type: ignore[attr-defined]
            if work is not None:
                work.synchronize()
        except RuntimeError as error:
            raise _broken(root, error) from error

    def close(self) -> None:
        """Abort the communicator: its kernels end, also those that wait for a member that is gone."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        try:
            _within(ABORT_S, self._group.abort, "NCCL to give the communicator up")
        except (RuntimeError, HeadraceError) as error:
            logger.warning("a broadcast group was left behind: %s", error)


def _dial(store: str, limit: timedelta) -> dist.TCPStore:  # type: ignore[name-defined]
    host, _, port = store.rpartition(":")
    return dist.TCPStore(host, int(port), is_master=False, timeout=limit)  # type: ignore[attr-defined]


def _options(root: int) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank = root
    return options


def _not_joined(store: str, rank: int, world_size: int, error: Exception) -> ConnectError:
    message = f"member {rank} of {world_size} could not join the broadcast group at {store}: {error}"
    return ConnectError(message, name=store, rank=rank)


def _broken(root: int, error: Exception) -> PeerLostError:
    return PeerLostError(f"the broadcast from member {root} broke: {error}", rank=root)


@contextmanager
def _unwatched() -> Iterator[None]:
    """Have torch make a process group without its watchdog, which ends the process when a peer dies.

    Deadlines and deaths are the coordinator's business here. torch reads the variable in the constructor only.
    """
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _within(deadline_s: float, work: Callable[[], None], what: str) -> None:
    """Run a call that may never return in a thread of its own; raises what it raises.

    Raises:
        TransferTimeoutError: It did not return within the deadline; its thread is left behind.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the caller, which raises it
            failures.append(error)

    thread = threading.Thread(target=run, name="headrace-nccl", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        message = f"waited {deadline_s:.0f} s for {what}"
        raise TransferTimeoutError(message)
    if failures:
        raise failures[0]


def serve_store(host: str) -> tuple[object, str]:
    """Open a rendezvous store on a free port; returns it (keep it alive) and its `host:port`."""
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    return store, f"{host}:{store.port}"
