"""Membership: a member's conversation with a keeper - what is held, a lease on it, who it is read from."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

from headrace import wire
from headrace.control.dialer import Dialer
from headrace.errors import RemoteProtocolError, TransportError
from headrace.server.invitation import Invitation

ANSWER_S = 30.0
_TELL_EVERY_S = 0.25
M = TypeVar("M", bound=wire.Message)


class Membership:
    """One connection to a keeper; with it end the lease and what was contributed. Safe from several threads.

    Args:
        invitation: The keeper.
        name: What this member is called there.

    Raises:
        ConfigError: The invitation is malformed.
    """

    def __init__(self, invitation: Invitation, name: str) -> None:
        self.keeper = invitation.address
        self._dialer = Dialer(invitation.endpoint, invitation.server_key)
        self._dialer.send(wire.MemberHello(token=invitation.token, name=name, pid=os.getpid()))
        self._lock = threading.Lock()
        self._told_s = 0.0
        self._late = 0

    def ask(self, *, lease: bool, version: int | None = None, deadline_s: float = ANSWER_S) -> wire.Offer:
        """Return the newest version that is held, or the given one; with `lease` it stays until `end_lease`.

        Raises:
            ConnectError: No keeper is there, or its key is another.
            LocalProtocolError: Nothing is held yet (retryable), or not that version.
            TransportError: The keeper is gone or does not answer.
        """
        return self._call(wire.AskOffer(lease=lease, version=version), wire.Offer, deadline_s)

    def standing(self, deadline_s: float = ANSWER_S) -> wire.Standing:
        """Return who holds what and who reads from whom."""
        return self._call(wire.AskStanding(), wire.Standing, deadline_s)

    def contribute(self, offers: Sequence[wire.Offer], deadline_s: float = ANSWER_S) -> None:
        """Have what is held here offered to others, as long as this connection lasts.

        Raises:
            ManifestMismatchError: The keeper's holders have other bytes under the same version.
        """
        self._call(wire.Contribute(tuple(offers)), wire.Standing, deadline_s)

    def tell(self, version: int, from_holders: Mapping[str, int], total_bytes: int) -> None:
        """Say how far reading is; most calls say nothing, and it is no matter whether the keeper is gone."""
        done = sum(from_holders.values()) >= total_bytes
        if time.monotonic() - self._told_s < _TELL_EVERY_S and not done:
            return
        self._told_s = time.monotonic()
        self._dialer.send(wire.Reading(version, dict(from_holders), total_bytes))

    def end_lease(self, joined: Sequence[str] = ()) -> None:
        """Read no more; `joined` are the engines that serve the version now."""
        self._dialer.send(wire.EndLease(tuple(joined)))

    def close(self) -> None:
        """Leave; idempotent."""
        self._dialer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, message: wire.Message, kind: type[M], deadline_s: float) -> M:
        with self._lock:
            self._dialer.send(message)
            try:
                answer = self._next_answer(time.monotonic() + deadline_s)
            except TransportError as error:
                text = f"keeper {self.keeper}: {error}; does it still run, and are address and token its own?"
                raise type(error)(text, name=self.keeper, phase="join") from error
        if isinstance(answer, wire.Failed):
            raise answer.failure.to_error()
        if not isinstance(answer, kind):
            text = f"keeper {self.keeper} answered {type(message).__name__} with {type(answer).__name__}"
            raise RemoteProtocolError(text, name=self.keeper, phase="join")
        return answer

    def _next_answer(self, limit: float) -> wire.AnyMessage:
        """Return the answer to the message just sent: those to calls that have given up come before it."""
        self._late += 1
        while True:
            answer = self._dialer.receive(max(0.0, limit - time.monotonic()))
            self._late -= 1
            if not self._late:
                return answer
