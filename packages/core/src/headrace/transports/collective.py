"""Broadcast groups: a communicator of the holders, beside whatever process group the application has."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import distributed as dist

from headrace.config import ALL_ADDRESSES
from headrace.errors import (
    BackendUnavailableError,
    ConnectError,
    HeadraceError,
    PeerLostError,
    TransferTimeoutError,
)
from headrace.transports.tcp_server import listen

logger = logging.getLogger(__name__)
ABORT_S = 5.0
_FIRST_BYTES = 1 << 20
_TURN_S = 0.25


class BroadcastGroup(Protocol):
    """Members that broadcast buffers to each other; made once and kept over updates.

    Collective: every member makes it with the same store and world size, and calls `broadcast` in the same order.
    The application's default process group is neither needed nor touched.

    Call order: 1. `begin`. 2. `meet`, `broadcast`, per buffer. 3. Again from 1, when all members are done, or `close`.
    """

    @property
    def place(self) -> tuple[str, int, torch.device | None]:
        """Store, number of members, and the GPU whose memory this member broadcasts; None for host memory."""
        ...

    def begin(self) -> None:
        """Begin a series of buffers; all members have ended the one before."""
        ...

    def meet(self, root: int, deadline_s: float, alive: Callable[[], None]) -> None:
        """Wait for the root, which calls this when its buffer is filled; the root waits for nobody.

        Raises:
            PeerLostError: The members' store is gone.
            TransferTimeoutError: The root did not come within the deadline.
            HeadraceError: What `alive`, called now and then, raised.
        """
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

    def begin(self) -> None:
        """Do nothing."""

    def meet(self, root: int, deadline_s: float, alive: Callable[[], None]) -> None:
        """Do nothing."""

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

    def begin(self) -> None:
        """Do nothing."""

    def meet(self, root: int, deadline_s: float, alive: Callable[[], None]) -> None:
        """Do nothing: who waits inside `broadcast` holds nobody up."""

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
    A kernel of NCCL that waits for another member takes time of its GPU from the engine there, which is another
    process: so members `meet` on the host first.

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
        require_nccl()
        self.place = (store, world_size, device)
        self._closing = threading.Lock()
        self._closed = False
        self._rank = rank
        limit = timedelta(seconds=deadline_s)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        # The streams of copy programs come from torch's pool of normal priority: a shared one would queue a broadcast
        # behind the next bucket's copies.
        options.is_high_priority_stream = True
        try:
            self._store = dist.PrefixStore("nccl", _dial(store, limit))  # type: ignore[attr-defined]
            self._meetings = Meetings(dist.PrefixStore("meet", self._store))  # type: ignore[attr-defined]
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

    def begin(self) -> None:
        """Clear away what this member told the others in the series before."""
        self._meetings.clear()

    def meet(self, root: int, deadline_s: float, alive: Callable[[], None]) -> None:
        """Wait for the root through the store, or tell the others."""
        if self._rank == root:
            self._meetings.tell()
        else:
            self._meetings.wait(deadline_s, alive)

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


class Meetings:
    """Numbered meetings of members, by keys of a store: one tells, the others wait. Used by one thread at a time.

    Every member takes part in every meeting, in the same order.

    Args:
        store: The members' own part of a store.
    """

    def __init__(self, store: Any) -> None:  # noqa: ANN401 - torch does not export the class of its stores
        self._store = store
        self._number = 0
        self._told: list[str] = []

    def tell(self) -> None:
        """Let the others go on from the next meeting.

        Raises:
            PeerLostError: The store is gone.
        """
        key = self._next()
        try:
            self._store.set(key, b"1")
        except RuntimeError as error:
            raise _store_gone(error) from error
        self._told.append(key)

    def wait(self, deadline_s: float, alive: Callable[[], None]) -> None:
        """Wait until somebody tells the next meeting; `alive` is called now and then and may raise.

        Raises:
            PeerLostError: The store is gone.
            TransferTimeoutError: Nobody did within the deadline.
        """
        key, limit = self._next(), time.monotonic() + deadline_s
        while not self._is_told(key):
            alive()
            if time.monotonic() > limit:
                message = f"waited {deadline_s:.1f} s for the member that fills the next bucket"
                raise TransferTimeoutError(message, phase="broadcast")

    def clear(self) -> None:
        """Remove what this member has told; nobody may be waiting for it any more."""
        try:
            while self._told:
                self._store.delete_key(self._told.pop())
        except RuntimeError as error:
            raise _store_gone(error) from error

    def _next(self) -> str:
        self._number += 1
        return str(self._number)

    def _is_told(self, key: str) -> bool:
        """Wait a little for a key: the store answers as soon as it is set."""
        try:
            self._store.wait([key], timedelta(seconds=_TURN_S))
        except RuntimeError:
            try:
                return bool(self._store.check([key]))
            except RuntimeError as error:
                raise _store_gone(error) from error
        return True


def _store_gone(error: Exception) -> PeerLostError:
    return PeerLostError(f"the store of the broadcast group is gone: {error}", phase="broadcast")


def require_nccl() -> None:
    """Refuse a torch without NCCL.

    Raises:
        BackendUnavailableError: It was built without.
    """
    if not dist.is_nccl_available():
        message = f"torch {torch.__version__} was built without NCCL; install one with it"
        raise BackendUnavailableError(message, name="nccl")


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


def serve_store(bind_host: str, advertise_host: str) -> tuple[object, str]:
    """Open a rendezvous store on a free port; returns it (keep it alive) and what members dial.

    It authenticates nobody, so it listens on no other address than the process's other sockets do; torch by itself
    would take all interfaces.

    Args:
        bind_host: What to listen on.
        advertise_host: Where members reach it.
    """
    with listen(bind_host) as listener:
        host, port = listener.getsockname()[:2]
        own = "localhost" if bind_host in ALL_ADDRESSES else host
        # torch closes what it is given.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            own, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )
    return store, f"{advertise_host}:{port}"
