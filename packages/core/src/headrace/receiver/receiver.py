"""Receiver: one engine worker's door for updates; it dials out when it is enrolled and does nothing before."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from headrace import wire
from headrace.control.dialer import Dialer
from headrace.errors import HeadraceError, WeightsState
from headrace.protocols import InferenceBackend, Ticket, Transport
from headrace.receiver.blocks import StagingArea
from headrace.receiver.devices import WorkerDevice
from headrace.receiver.mapped import Mappings
from headrace.receiver.recipes import RecipeBook
from headrace.receiver.session import Session
from headrace.registry import load
from headrace.telemetry import Recorder

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Receiver:
    """Takes updates for one worker, one at a time, in a thread of its own.

    Lives in the worker's process. Making one starts nothing; `enrol` starts a thread that ends with the update.

    Args:
        backend: The worker.
        reserved: Memory for staging that is the receiver's for good: flat uint8, on the worker's device.

    Attributes:
        weights_state: `old`: live tensors hold `served_version`; `new`: they hold `pending_version`, which the
            engine does not report yet; `mixed`: a commit broke off, the engine must stay paused.
        served_version: Version the engine reports; 0 for what it was started with, None before its first weights.
        pending_version: Version in the live tensors that not all ranks have confirmed.
        turn: Held by the session at work.
        device: Where it works; kept over updates, as torch caches memory by stream.
    """

    def __init__(self, backend: InferenceBackend, reserved: torch.Tensor | None = None) -> None:
        self.backend = backend
        self.weights_state: WeightsState = "old"
        self.served_version: int | None = None if backend.loaded_from() is None else 0
        self.pending_version: int | None = None
        self.recorder = Recorder(f"receiver {backend.identity().worker}")
        self.recipes = RecipeBook(backend, self.recorder)
        self.staging = StagingArea(reserved)
        self.memory = Mappings(self.staging)
        self.device = WorkerDevice(backend.identity().device)
        self._transports: dict[str, Transport] = {}
        self._session: Session | None = None
        self._lock = threading.Lock()
        self.turn = threading.Lock()

    def enrol(self, ticket: Ticket) -> None:
        """Dial the coordinator and take part in its update; returns at once.

        While another update holds this receiver, the new coordinator is told which.
        """
        with self._lock:
            current = self._session
            if current is not None and current.alive:
                start, args = self._tell_busy, (ticket, current.ticket.update_id)
            else:
                self._session = Session(self, ticket)
                start, args = self._session.run, ()  # type: ignore[assignment]
        threading.Thread(target=start, args=args, name="headrace-receiver", daemon=True).start()

    def hold(self, update_id: str, deadline_s: float) -> int | None:
        """Stand still until the update's session lets go; returns the version that was taken meanwhile, or None.

        Called on the worker's own thread between two forward steps, with the stream that they run on as the current
        one. Returns at once where that update is not under way here. Where nobody may let go any more, this process
        ends: see `headrace.receiver.hold`.

        Args:
            update_id: The update.
            deadline_s: Limit.
        """
        session = self._session
        if session is None or session.ticket.update_id != update_id:
            return None
        return session.hold.stand(deadline_s)

    def hello(self, update_id: str, token: str, busy_with: str | None = None) -> wire.ReceiverHello:
        """Return the message by which this receiver presents itself."""
        identity = self.backend.identity()
        return wire.ReceiverHello(
            update_id=update_id,
            token=token,
            worker=identity.worker,
            world_size=identity.world_size,
            device=identity.device,
            weights_state=self.weights_state,
            served_version=self.served_version,
            pending_version=self.pending_version,
            busy_with=busy_with,
            device_uuid=identity.device_uuid if self.device.is_cuda else "",
        )

    def transport(self, name: str) -> Transport:
        """Return a transport that copies, made on first use and kept over updates.

        Raises:
            BackendUnavailableError: No installed distribution offers it.
        """
        if name not in self._transports:
            self._transports[name] = load("headrace.transports", name)()
        return self._transports[name]

    def close(self) -> None:
        """Leave a running update (it fails) and release mappings; idempotent."""
        if self._session is not None:
            self._session.leave()
        self.memory.close()
        for transport in self._transports.values():
            transport.close()

    def _tell_busy(self, ticket: Ticket, holder: str) -> None:
        try:
            dialer = Dialer(ticket.endpoint, ticket.server_key)
        except HeadraceError as error:
            logger.warning("update %s has a ticket that is no use: %s", ticket.update_id, error)
            return
        try:
            dialer.send(self.hello(ticket.update_id, ticket.token, busy_with=holder))
            dialer.receive(10.0)
        except HeadraceError as error:
            logger.info("update %s was told that %s is running: %s", ticket.update_id, holder, error)
        finally:
            dialer.close(linger_s=1.0)
