"""Keeper: keeps what holders hold open to joiners; the body of `headrace hold`."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np

from headrace import wire
from headrace.config import Deadlines, HostSettings
from headrace.control.hub import Hub
from headrace.errors import ConfigError, HeadraceError
from headrace.manifest import Manifest
from headrace.server.exchange import Exchange
from headrace.server.holders import Crew, HolderPool, ProgressCallback, SourceSpec
from headrace.server.invitation import Invitation
from headrace.server.membership import Membership
from headrace.server.switchboard import Switchboard
from headrace.server.whole import params_of, sum_tables

logger = logging.getLogger(__name__)
SUMS_S = 600.0
PARTNERS_EVERY_S = 1.0


class Keeper:
    """Offers what a pool of holders holds to members, and what other keepers hold as well.

    Used by the thread that uses the pool; members are answered by threads of its own.

    Args:
        pool: Its holders; the caller's to stop.
        host: Where to listen for members.
        partners: Other keepers of the same source: each offers what both hold.
    """

    def __init__(self, pool: HolderPool, host: HostSettings, partners: Sequence[Invitation] = ()) -> None:
        self._pool = pool
        self._partners = [Membership(one, f"keeper on {socket.gethostname()}") for one in partners]
        self._own: tuple[wire.Offer, ...] = ()
        self.exchange = Exchange(host, self._pin)
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._follow_partners, name="headrace-partners", daemon=True)

    def partner_version(self) -> int | None:
        """Return the newest version that a partner holds, or None where there is none."""
        return max((partner.ask(lease=False).version for partner in self._partners), default=None)

    def offer(self, manifests: Sequence[Manifest]) -> wire.Offer:
        """Have the holders sum up a version that they have published, and offer it. Blocking.

        Raises:
            UncoveredRegionError: The holders do not have the whole version.
            ManifestMismatchError: A partner holds other bytes under the same version.
        """
        version = manifests[0].version
        tables, size = sum_tables(manifests), len(params_of(manifests))
        for holder, table in tables.items():
            order = wire.SumDigests(key="whole", version=version, table=table, num_groups=size)
            self._pool.peers[holder].send(order)
        sums = np.zeros(size, np.uint64)
        for holder in tables:
            sums += self._pool.peers[holder].expect(wire.Digests, SUMS_S, "digest").sums
        made = wire.Offer(version, tuple(manifests), sums)
        for partner in self._partners:
            partner.contribute([made])
        self.exchange.offer(made)
        self._own = (made,)
        if self._partners and not self._watch.is_alive():
            self._ask_partners()
            self._watch.start()
        return made

    def check(self) -> None:
        """Do nothing while what is offered is held.

        Raises:
            PeerLostError: A holder is lost; nobody can join from what is left.
        """
        self._pool.check()

    def close(self) -> None:
        """Leave partners and members; idempotent."""
        self._closing.set()
        for partner in self._partners:
            partner.close()
        if self._watch.is_alive():
            self._watch.join(PARTNERS_EVERY_S)
        self.exchange.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pin(self, version: int, pinned: bool) -> None:
        for peer in self._pool.peers:
            peer.send(wire.Pin(version, pinned))

    def _follow_partners(self) -> None:
        while not self._closing.wait(PARTNERS_EVERY_S):
            self._ask_partners()

    def _ask_partners(self) -> None:
        """Learn what each partner offers beside our own; one that is gone offers nothing any more."""
        own = {m.holder.holder_id for offer in self._own for m in offer.manifests}
        for partner in self._partners:
            offers: list[wire.Offer] = []
            try:
                found = partner.ask(lease=False, deadline_s=2 * PARTNERS_EVERY_S)
                theirs = tuple(m for m in found.manifests if m.holder.holder_id not in own)
                offers = [wire.Offer(found.version, theirs, found.sums)] if theirs else []
            except HeadraceError as error:
                logger.debug("partner %s offers nothing: %s", partner.keeper, error)
            try:
                self.exchange.adopt(partner.keeper, offers)
            except HeadraceError as error:
                logger.warning("what partner %s holds is offered to nobody: %s", partner.keeper, error)


@contextmanager
def keep(
    source: SourceSpec,
    host: HostSettings,
    *,
    crew: Crew | None = None,
    version: int | None = None,
    partners: Sequence[Invitation] = (),
    progress: ProgressCallback | None = None,
) -> Iterator[Keeper]:
    """Read a source into memory and yield its keeper, which members can join from until the end.

    Args:
        source: What to hold.
        host: Sockets of this host.
        crew: Processes that hold a part each, this one being rank 0; None holds everything here.
        version: Number of the version; None takes that of the partners, or 1.
        partners: Other keepers of the same source.
        progress: Called with (phase, bytes done, bytes in all).

    Raises:
        CheckpointError: The source cannot be read.
        ManifestMismatchError: A partner holds something else.
    """
    board = Switchboard(Hub(replace(host, bind_port=0)))
    pool = HolderPool(source, board, host, crew)
    try:
        with Keeper(pool, host, partners) as keeper:
            chosen = version if version is not None else (keeper.partner_version() or 1)
            if chosen < 0:
                raise ConfigError(f"version is {chosen}; it must not be negative", name="version")
            pool.ensure(1)
            keeper.offer(pool.publish(chosen, Deadlines(), progress))
            yield keeper
    finally:
        pool.stop()
        board.close()
