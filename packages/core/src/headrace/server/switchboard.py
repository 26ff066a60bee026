"""Switchboard: the coordinator's conversations, one mailbox per connected receiver or holder."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from headrace import wire
from headrace.control.hub import Hub
from headrace.control.peers import Event, Lost, PeerId
from headrace.errors import (
    FailureKey,
    HeadraceError,
    LocalProtocolError,
    PeerLostError,
    RemoteFailure,
    RemoteProtocolError,
    TransferTimeoutError,
    TransportClosedError,
    UpdateFailedError,
    VersionSkewError,
    WeightsState,
)
from headrace.telemetry import Span

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=wire.Message)
_POLL_S = 1.0
DISMISS_S = 5.0
WATCH_S = 0.2


class Peer:
    """One admitted peer: who it said it is, and what it has sent that nobody took yet."""

    def __init__(self, hub: Hub, peer_id: PeerId, hello: wire.ReceiverHello | wire.HolderHello) -> None:
        self.id = peer_id
        self.hello = hello
        self.spans: list[Span] = []
        self.on_progress: Callable[[wire.Progress], None] | None = None
        self._hub = hub
        self._inbox: queue.SimpleQueue[wire.AnyMessage | Lost] = queue.SimpleQueue()
        self._lost: Lost | None = None
        self._kept: wire.BroadcastDone | None = None

    @property
    def key(self) -> FailureKey:
        """(instance, rank) of a receiver, ("holder", index) of a holder."""
        hello = self.hello
        if isinstance(hello, wire.ReceiverHello):
            return (hello.worker.instance, hello.worker.rank)
        return ("holder", hello.index)

    @property
    def receiver(self) -> wire.ReceiverHello:
        """What a receiver said when it came.

        Raises:
            LocalProtocolError: This peer is none.
        """
        if not isinstance(self.hello, wire.ReceiverHello):
            raise LocalProtocolError(f"{_label(self.key)} is no receiver")
        return self.hello

    @property
    def lost(self) -> bool:
        """Whether the connection is gone."""
        return self._lost is not None

    def check(self, phase: str) -> None:
        """Do nothing while the peer is there.

        Raises:
            PeerLostError: It is lost; says in which phase.
        """
        if self.lost:
            raise self._gone(phase)

    def deliver(self, message: wire.AnyMessage | Lost) -> None:
        """Put what the hub received into the mailbox; from the pump's thread."""
        if isinstance(message, Lost):
            self._lost = message
        if isinstance(message, wire.Progress) and self.on_progress is not None:
            self.on_progress(message)
            return
        self._inbox.put(message)

    def send(self, message: wire.Message) -> None:
        """Send without waiting."""
        self._hub.send(self.id, message)

    def expect(
        self,
        kind: type[M],
        deadline_s: float,
        phase: str,
        watch: Sequence[Peer] = (),
        alive: Callable[[], None] | None = None,
    ) -> M:
        """Wait for the next message and return it, if it is of `kind`.

        A holder's `BroadcastDone` may come while something else is awaited, and is kept.

        Args:
            kind: What is awaited.
            deadline_s: Limit.
            phase: For messages.
            watch: Peers whose loss ends the wait too, as the answer depends on them.
            alive: Called now and then while waiting; may raise to break the wait off.

        Raises:
            HeadraceError: The peer's own failure, rebuilt.
            PeerLostError: The peer, or one of `watch`, died.
            TransferTimeoutError: Nothing came within the deadline.
            RemoteProtocolError: Something else came.
        """
        limit = time.monotonic() + deadline_s
        while True:
            message = self._next(kind, limit, watch, alive)
            if message is None:
                waited = f"within {deadline_s:.1f} s" if deadline_s > 0 else "in time"
                text = f"{_label(self.key)} did not answer {waited} in {phase}"
                raise TransferTimeoutError(text, phase=phase, rank=self.key[1])
            if isinstance(message, Lost):
                raise self._gone(phase)
            if isinstance(message, wire.Failed):
                raise message.failure.to_error()
            self.spans += getattr(message, "spans", ())
            if isinstance(message, kind):
                return message
            if not isinstance(message, wire.BroadcastDone):
                text = (
                    f"{_label(self.key)} sent {type(message).__name__} in {phase}, expected {kind.__name__}"
                )
                raise RemoteProtocolError(text, phase=phase, rank=self.key[1])
            self._kept = message

    def settle(self, nonce: str, limit: float) -> bool:
        """Drop all that was sent before the answer to `Settle`; False where that does not come."""
        while not self.lost and (answer := self.drain(wire.Settled, limit)) is not None:
            if answer.nonce == nonce:
                return True
        return False

    def drain(self, kind: type[M], limit: float) -> M | None:
        """Drop all that was sent before a message of `kind`, and return that; None where it does not come."""
        self._kept = None
        while (message := self._next(kind, limit, ())) is not None and not isinstance(message, Lost):
            if isinstance(message, kind):
                return message
        return None

    def _next(
        self,
        kind: type[wire.Message],
        limit: float,
        watch: Sequence[Peer],
        alive: Callable[[], None] | None = None,
    ) -> wire.Message | Lost | None:
        """Return the next message or `Lost`, or None at the limit."""
        if isinstance(self._kept, kind):
            kept, self._kept = self._kept, None
            return kept
        while True:
            if self._lost is not None and self._inbox.empty():
                return self._lost
            for other in watch:
                other.check("its work for this update")
            if alive is not None and self._inbox.empty():
                alive()
            left = limit - time.monotonic()
            try:
                return self._inbox.get(timeout=max(0.0, min(left, WATCH_S) if watch or alive else left))
            except queue.Empty:
                if limit <= time.monotonic():
                    return None

    def _gone(self, phase: str) -> PeerLostError:
        reason = self._lost.reason if self._lost else "unknown"
        text = f"{_label(self.key)} was lost in {phase}: {reason}"
        return PeerLostError(text, phase=phase, rank=self.key[1])


def _label(key: FailureKey) -> str:
    return f"holder {key[1]}" if key[0] == "holder" else f"worker {key[1]} of instance {key[0]}"


class Switchboard:
    """Reads the hub in one thread and sorts what comes into mailboxes. Owns the hub."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._peers: dict[PeerId, Peer] = {}
        self._arrived: queue.SimpleQueue[Peer] = queue.SimpleQueue()
        self._given_up: frozenset[str] = frozenset()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="headrace-switchboard", daemon=True)
        self._thread.start()

    def arrivals(
        self,
        count: int,
        wanted: Callable[[Peer], bool],
        deadline_s: float,
        what: str,
        alive: Callable[[], None] = lambda: None,
        hint: str = "",
    ) -> list[Peer]:
        """Wait until `count` peers that are `wanted` have presented themselves; others are sent away.

        So is who had come, when the wait fails or is broken off: nobody must wait for an update that will not be.

        Args:
            count: How many.
            wanted: Whether a peer is one of them.
            deadline_s: Limit.
            what: What they are, for messages.
            alive: Called now and then while waiting; may raise to break the wait off.
            hint: What may be wrong where some came and others did not, for messages.

        Raises:
            VersionSkewError: Fewer came, and one that spoke another protocol version was refused.
            TransferTimeoutError: Fewer came within the deadline; says which came and who was refused.
        """
        limit = time.monotonic() + deadline_s
        found: list[Peer] = []
        try:
            while len(found) < count:
                peer = self._arrival(limit)
                if peer is None:
                    alive()
                    if time.monotonic() >= limit:
                        text = f"{what} did not dial in within {deadline_s:.0f} s"
                        raise self._too_few(found, count, text, hint if found else "")
                elif wanted(peer):
                    found.append(peer)
                else:
                    self._dismiss([peer])
        except BaseException:
            self._dismiss(found)
            raise
        self.hub.take_refusals()
        return found

    def _arrival(self, limit: float) -> Peer | None:
        try:
            return self._arrived.get(timeout=max(0.0, min(WATCH_S, limit - time.monotonic())))
        except queue.Empty:
            return None

    def _too_few(self, found: Sequence[Peer], count: int, what: str, hint: str) -> HeadraceError:
        came = ", ".join(_label(peer.key) for peer in found) or "nobody"
        refusals = self.hub.take_refusals()
        refused = "; refused: " + ", ".join(str(error) for error in refusals) if refusals else ""
        asked = f"; {hint}" if hint else ""
        text = f"{count - len(found)} of {count} {what}; came: {came}{refused}{asked}"
        if any(isinstance(error, VersionSkewError) for error in refusals):
            return VersionSkewError(text, phase="enrol")
        return TransferTimeoutError(text, phase="enrol", retryable=True)

    def give_up(self, tokens: Collection[str]) -> None:
        """Wait no more for peers with these tokens: who has come, and who still does, is sent away."""
        for token in tokens:
            self.hub.revoke(token)
        self._given_up = frozenset(tokens)
        came: list[Peer] = []
        while (peer := self._arrival(0.0)) is not None:
            came.append(peer)
        self._dismiss(came)

    def _dismiss(self, peers: Sequence[Peer]) -> None:
        """Send peers away; returns when receivers are free for another update, or do not answer."""
        for peer in peers:
            _send_away(peer)
        limit = time.monotonic() + DISMISS_S
        for peer in peers:
            if isinstance(peer.hello, wire.ReceiverHello):
                with suppress(HeadraceError):
                    peer.expect(wire.Aborted, limit - time.monotonic(), "abort")
        self.forget(peers)

    def forget(self, peers: Sequence[Peer]) -> None:
        """Drop peers whose part is over."""
        for peer in peers:
            self._peers.pop(peer.id, None)
            self.hub.forget(peer.id)

    def close(self) -> None:
        """Close the hub; idempotent."""
        self._closed.set()
        self.hub.close()
        self._thread.join(2 * _POLL_S)

    def _pump(self) -> None:
        while not self._closed.is_set():
            try:
                self._sort(self.hub.receive(_POLL_S))
            except TransferTimeoutError:
                continue
            except TransportClosedError:
                return

    def _sort(self, event: Event) -> None:
        if isinstance(event, Lost):
            peer = self._peers.pop(event.peer, None)
            if peer is not None:
                peer.deliver(event)
            return
        peer_id, message = event.peer, event.message
        known = self._peers.get(peer_id)
        if known is not None:
            known.deliver(message)
        elif isinstance(message, wire.ReceiverHello | wire.HolderHello):
            self._meet(Peer(self.hub, peer_id, message))

    def _meet(self, peer: Peer) -> None:
        if peer.hello.token in self._given_up:
            _send_away(peer)
            self.forget([peer])
        else:
            self._peers[peer.id] = peer
            self._arrived.put(peer)


def _send_away(peer: Peer) -> None:
    is_receiver = isinstance(peer.hello, wire.ReceiverHello)
    peer.send(wire.Abort(reason="the update was given up") if is_receiver else wire.Shutdown())


def tell(peers: Sequence[Peer], message: wire.Message) -> list[Peer]:
    """Send to all peers that are still there, and return them; nobody is where the hub was closed."""
    told: list[Peer] = []
    for peer in peers:
        if not peer.lost:
            with suppress(TransportClosedError):
                peer.send(message)
                told.append(peer)
    return told


def ask_all(
    peers: Sequence[Peer],
    message: Callable[[Peer], wire.Message] | wire.Message,
    kind: type[M],
    deadline_s: float,
    phase: str,
    alive: Callable[[], None] | None = None,
) -> dict[FailureKey, M]:
    """Ask every peer at once and wait for all answers, within one deadline.

    Raises:
        UpdateFailedError: At least one peer failed; holds the failure of every one that did.
    """
    for peer in peers:
        peer.send(message(peer) if callable(message) else message)
    return gather(peers, kind, deadline_s, phase, alive=alive)


def gather(
    peers: Sequence[Peer],
    kind: type[M],
    deadline_s: float,
    phase: str,
    watch: Sequence[Peer] = (),
    alive: Callable[[], None] | None = None,
) -> dict[FailureKey, M]:
    """Wait for one answer of every peer, within one deadline; the loss of a peer in `watch` ends it for all.

    Raises:
        UpdateFailedError: At least one peer failed; holds the failure of every one that did.
    """
    limit = time.monotonic() + deadline_s
    answers: dict[FailureKey, M] = {}
    errors: dict[FailureKey, HeadraceError] = {}
    for peer in peers:
        try:
            answers[peer.key] = peer.expect(kind, limit - time.monotonic(), phase, watch, alive)
        except HeadraceError as error:
            errors[peer.key] = error
    if errors:
        raise failed(errors, phase)
    return answers


def failed(errors: Mapping[FailureKey, HeadraceError], phase: str) -> UpdateFailedError:
    """Return one error that carries those of all ranks."""
    failures = {
        key: RemoteFailure.of(error, phase=phase, weights_state=error.weights_state)
        for key, error in errors.items()
    }
    key, first = next(iter(errors.items()))
    more = f" (and {len(errors) - 1} more ranks)" if len(errors) > 1 else ""
    states: set[WeightsState] = {error.weights_state for error in errors.values()}
    return UpdateFailedError(
        f"{_label(key)} failed in {phase}: {first}{more}",
        failures,
        phase=phase,
        rank=key[1],
        name=first.name,
        retryable=all(error.retryable for error in errors.values()),
        weights_state="mixed" if "mixed" in states or len(states) > 1 else states.pop(),
    )
