"""Exchange: a keeper's door for members - who holds which version, who reads from whom, what must stay held."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import TracebackType
from typing import Self

from headrace import wire
from headrace.config import HostSettings
from headrace.control.hub import Hub
from headrace.control.keys import new_token
from headrace.control.peers import Event, Lost, PeerId
from headrace.errors import (
    HeadraceError,
    LocalProtocolError,
    ManifestMismatchError,
    RemoteFailure,
    TransferTimeoutError,
    TransportClosedError,
)
from headrace.manifest import Manifest
from headrace.server.invitation import Invitation
from headrace.server.whole import check_equal, check_whole

logger = logging.getLogger(__name__)
MOST_MEMBERS = 1 << 20
_POLL_S = 1.0
PinCallback = Callable[[int, bool], None]


@dataclass
class _Member:
    """One connected member.

    Attributes:
        name: What it calls itself.
        since: When it came, monotonic.
        lease: Version that it reads.
        reading: What it last said of its reading.
        holds: What it contributes.
        joined: Engines that it brought to a version.
    """

    name: str
    since: float = field(default_factory=time.monotonic)
    lease: int | None = None
    reading: wire.Reading | None = None
    holds: tuple[wire.Offer, ...] = ()
    joined: tuple[str, ...] = ()


class Exchange:
    """Answers members of one keeper. The constructor binds and starts two daemon threads.

    A member's connection is its membership: it ends when the process does, or when nothing was heard of it for the
    hub's heartbeat. With it end its lease and what it contributed. No member can hold up another: answers are made
    from what is known, and nobody is waited for.

    Args:
        host: Where to bind and what to advertise.
        pin: Called when the first member begins to read an own version and when the last one has ended.
        heartbeat_s: Silence after which a member is gone.
    """

    def __init__(self, host: HostSettings, pin: PinCallback, heartbeat_s: float = 10.0) -> None:
        self._hub = Hub(host, heartbeat_s)
        token = new_token()
        self._hub.admit(token, MOST_MEMBERS)
        self.invitation = Invitation(self._hub.endpoint, self._hub.server_key, token)
        self._pin = pin
        self._own: dict[int, wire.Offer] = {}
        self._members: dict[PeerId, _Member] = {}
        self._partners: dict[str, tuple[wire.Offer, ...]] = {}
        self._pinned: set[int] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-exchange", daemon=True)
        self._thread.start()

    def offer(self, offer: wire.Offer) -> None:
        """Offer a version that is held here whole; who asks from now on gets it, versions before it are history."""
        with self._lock:
            leased = self._leased()
            self._own = {v: o for v, o in self._own.items() if v in leased} | {offer.version: offer}
            self._drop_unlike(offer)

    def adopt(self, keeper: str, offers: Sequence[wire.Offer]) -> None:
        """Offer what another keeper holds as well; in place of what it had before. Nothing where it is gone.

        Raises:
            ManifestMismatchError: It holds other bytes under the same version.
            RemoteProtocolError: An offer is malformed.
        """
        with self._lock:
            self._partners.pop(keeper, None)
            self._check(keeper, offers)
            if offers:
                self._partners[keeper] = tuple(offers)
            for offer in offers:
                self._drop_unlike(offer)

    def standing(self) -> wire.Standing:
        """Return who holds what and who reads from whom."""
        with self._lock:
            holders = [_holder(m, o.version, "") for o in self._own.values() for m in o.manifests]
            for keeper, offers in self._partners.items():
                holders += [_holder(m, o.version, keeper) for o in offers for m in o.manifests]
            for member in self._members.values():
                holders += [_holder(m, o.version, member.name) for o in member.holds for m in o.manifests]
            return wire.Standing(tuple(holders), tuple(_standing(m) for m in self._members.values()))

    def close(self) -> None:
        """End all conversations; idempotent."""
        self._closed.set()
        self._hub.close()
        self._thread.join(2 * _POLL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._take(self._hub.receive(_POLL_S))
            except TransferTimeoutError:
                continue
            except TransportClosedError:
                return

    def _take(self, event: Event) -> None:
        """Take one message; what is wrong with it is the member's failure, never this keeper's."""
        peer = event.peer
        if isinstance(event, Lost):
            self._leave(peer, event.reason)
            return
        try:
            reply = self._answer(peer, event.message)
        except HeadraceError as error:
            logger.info("%s: %s", peer, error)
            reply = wire.Failed(failure=RemoteFailure.of(error, phase="join"))
        if reply is not None:
            self._hub.send(peer, reply)

    def _answer(self, peer: PeerId, message: wire.AnyMessage) -> wire.Message | None:
        if isinstance(message, wire.MemberHello):
            with self._lock:
                self._members[peer] = _Member(message.name)
            return None
        member = self._members.get(peer)
        if member is None:
            text = f"a {type(message).__name__} came before the hello of {peer}"
            raise LocalProtocolError(text)
        match message:
            case wire.AskOffer():
                return self._lease(member, message)
            case wire.EndLease():
                member.joined = message.joined or member.joined
                self._end_lease(member)
            case wire.Reading():
                member.reading = message
            case wire.Contribute():
                self._contribute(member, message.offers)
                return self.standing()
            case wire.AskStanding():
                return self.standing()
            case _:
                text = f"a keeper has no answer to {type(message).__name__}"
                raise LocalProtocolError(text)
        return None

    def _lease(self, member: _Member, asked: wire.AskOffer) -> wire.Offer:
        with self._lock:
            versions = self._known()
            version = max(versions, default=None) if asked.version is None else asked.version
            found = versions.get(version) if version is not None else None
            if version is None or not found:
                held = ", ".join(map(str, sorted(versions))) or "none yet"
                text = (
                    f"version {version} is not held here; held: {held}"
                    if version is not None
                    else "no version is held yet"
                )
                raise LocalProtocolError(text, weight_version=version, retryable=True)
            manifests = {m.holder.holder_id: m for offer in found for m in offer.manifests}
            if asked.lease:
                member.lease, member.reading = version, None
        if asked.lease:
            self._repin()
        return wire.Offer(version, tuple(manifests.values()), found[0].sums)

    def _known(self) -> dict[int, list[wire.Offer]]:
        """Return who offers each version, the same bytes all; with the lock held. Own holders come first.

        Versions are those that this keeper or a partner holds: members only add to them. What a member has beside
        them is believed of nobody who could do no more than read.
        """
        known: dict[int, list[wire.Offer]] = {}
        for offer in (*self._own.values(), *chain(*self._partners.values())):
            known.setdefault(offer.version, []).append(offer)
        for offer in chain(*(member.holds for member in self._members.values())):
            if offer.version in known:
                known[offer.version].append(offer)
        return known

    def _drop_unlike(self, offer: wire.Offer) -> None:
        """Forget what members had contributed as other bytes under this version; with the lock held."""
        for member in self._members.values():
            held = [other for other in member.holds if other.version == offer.version]
            try:
                for other in held:
                    check_equal(other, offer, member.name)
            except ManifestMismatchError as error:
                logger.warning("what member %s holds is offered to nobody: %s", member.name, error)
                member.holds = ()

    def _contribute(self, member: _Member, offers: tuple[wire.Offer, ...]) -> None:
        """Take what a member holds, if it is what others hold under the same version.

        A version that nobody else holds yet waits until this keeper or a partner holds it too.

        Raises:
            ManifestMismatchError: It is another model or other bytes.
            RemoteProtocolError: An offer is malformed.
        """
        with self._lock:
            member.holds = ()
            self._check(member.name, offers)
            member.holds = offers

    def _check(self, who: str, offers: Sequence[wire.Offer]) -> None:
        known = self._known()
        for offer in offers:
            check_whole(offer, who)
            for other in known.get(offer.version, ())[:1]:
                check_equal(offer, other, who)

    def _end_lease(self, member: _Member) -> None:
        member.lease, member.reading = None, None
        self._repin()

    def _leave(self, peer: PeerId, reason: str) -> None:
        with self._lock:
            member = self._members.pop(peer, None)
        if member is not None:
            logger.info("member %s is gone: %s", member.name, reason)
            self._repin()

    def _leased(self) -> set[int]:
        """Return the versions that somebody reads; with the lock held."""
        return {m.lease for m in self._members.values() if m.lease is not None}

    def _repin(self) -> None:
        """Have own versions kept that somebody reads, and no others."""
        with self._lock:
            wanted = self._leased() & self._own.keys()
            changes = [(version, version in wanted) for version in sorted(wanted ^ self._pinned)]
            self._pinned = wanted
            newest = max(self._own, default=-1)
            self._own = {v: offer for v, offer in self._own.items() if v in wanted or v == newest}
        for version, pinned in changes:
            self._pin(version, pinned)


def _holder(manifest: Manifest, version: int, member: str) -> wire.HolderStanding:
    address = manifest.holder
    return wire.HolderStanding(
        name=address.holder_id,
        host=address.tcp_endpoint.rpartition(":")[0].strip("[]") or "this host only",
        version=version,
        num_bytes=sum(segment.num_bytes for segment in manifest.segments),
        of_member=member,
    )


def _standing(member: _Member) -> wire.MemberStanding:
    reading = member.reading
    return wire.MemberStanding(
        name=member.name,
        version=member.lease,
        from_holders=reading.from_holders if reading else {},
        total_bytes=reading.total_bytes if reading else 0,
        connected_s=time.monotonic() - member.since,
        joined=member.joined,
    )
