"""Keepers in this process: leases, versions that are replaced, holders that lie, members that vanish, metas files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import wire
from headrace.config import Deadlines, HostSettings
from headrace.control import Hub, new_token
from headrace.errors import (
    ConfigError,
    HeadraceError,
    IntegrityError,
    LocalProtocolError,
    ManifestMismatchError,
    PeerLostError,
    RemoteProtocolError,
    TransportError,
)
from headrace.server.exchange import Exchange
from headrace.server.fetching import ReadSettings
from headrace.server.holders import HolderPool, SourceSpec
from headrace.server.invitation import Invitation
from headrace.server.joining import Ways
from headrace.server.keeping import Keeper
from headrace.server.membership import Membership
from headrace.server.reading import PeerSource
from headrace.server.switchboard import Switchboard
from headrace.store.layout import Layout
from headrace.store.tensors import TensorSource

pytestmark = pytest.mark.timeout(120)
READS = ReadSettings(batch_bytes=64 << 10, open_s=2.0, patience_s=2.0)
Weights = dict[str, torch.Tensor]


def weights(seed: int) -> Weights:
    random = torch.Generator().manual_seed(seed)
    made = {f"layer.{i}": torch.randn(64, 100 + i, generator=random).to(torch.bfloat16) for i in range(9)}
    return made | {
        "step": torch.tensor(seed),
        "empty": torch.zeros(0, 4),
        "big": torch.randn(512, 256, generator=random),
    }


class Kept:
    """A keeper of tensors that change from version to version."""

    def __init__(self, folder: Path, first: Weights) -> None:
        folder.mkdir(mode=0o700)
        host = HostSettings(socket_dir=folder, permitted_uids=frozenset())
        self.tensors = dict(first)
        self._board = Switchboard(Hub(host))
        self.pool = HolderPool(SourceSpec(source=TensorSource(self.tensors)), self._board, host)
        self.host = host
        self.keeper: Keeper | None = None

    def start(self, partners: Sequence[Invitation] = ()) -> Kept:
        self.keeper = Keeper(self.pool, self.host, partners)
        self.pool.ensure(1)
        return self

    def publish(self, version: int, new: Weights | None = None) -> wire.Offer:
        assert self.keeper is not None
        for name, value in (new or {}).items():
            self.tensors[name].copy_(value)
        return self.keeper.offer(self.pool.publish(version, Deadlines()))

    @property
    def invitation(self) -> Invitation:
        assert self.keeper is not None
        return self.keeper.exchange.invitation

    @property
    def standing(self) -> wire.Standing:
        assert self.keeper is not None
        return self.keeper.exchange.standing()

    def close(self) -> None:
        if self.keeper is not None:
            self.keeper.close()
        self.pool.stop()
        self._board.close()


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    with ExitStack() as stack:
        count = 0

        def make(first: Weights, *partners: Kept) -> Kept:
            nonlocal count
            count += 1
            kept = Kept(tmp_path / f"s{count}", first)
            stack.callback(kept.close)
            return kept.start([partner.invitation for partner in partners])

        yield make


@pytest.fixture
def way() -> Iterator[Ways]:
    made = Ways("tcp")
    yield made
    made.close()


def read(offer: wire.Offer, way: Any) -> Weights:
    source = PeerSource(offer, way, READS)
    layout = Layout.of(source.metadata(), source.regions())
    blocks = [torch.zeros(size, dtype=torch.uint8) for size in layout.segment_bytes]
    source.fill(layout.region_table(), blocks, lambda _done, _total: None, 30.0)
    found = {}
    for slot, meta in zip(layout.slots, source.metadata(), strict=True):
        data = blocks[slot.segment][slot.begin : slot.begin + slot.num_bytes]
        found[meta.name] = data.clone().view(getattr(torch, meta.dtype)).reshape(meta.shape)
    return found


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "it never came to be"
        time.sleep(0.02)


def test_a_version_stays_while_somebody_reads_it(keep: Callable[..., Kept], way: Ways) -> None:
    """Published over and over, the reader's version keeps its bytes; afterwards its memory is used again."""
    kept = keep(weights(1))
    kept.publish(1)
    with Membership(kept.invitation, "reader") as member:
        first = member.ask(lease=True)
        for version in range(2, 6):
            kept.publish(version, weights(version))
        assert same(read(first, way), weights(1))
        with Membership(kept.invitation, "late") as late:
            newest = late.ask(lease=True)
            assert newest.version == 5
            assert same(read(newest, way), weights(5))
        member.end_lease(["torch=http://x"])
        until(lambda: {h.version for h in kept.standing.holders} == {5})
        assert [m.joined for m in kept.standing.members if m.name == "reader"] == [("torch=http://x",)]
        kept.publish(6, weights(6))
        kept.publish(7, weights(7))
        with pytest.raises(HeadraceError):
            read(first, way)


def test_a_member_that_vanishes_ends_its_lease(keep: Callable[..., Kept]) -> None:
    kept = keep(weights(1))
    kept.publish(1)
    member = Membership(kept.invitation, "reader")
    member.ask(lease=True)
    kept.publish(2, weights(2))
    assert {h.version for h in kept.standing.holders} == {1, 2}
    member.close()
    until(lambda: {h.version for h in kept.standing.holders} == {2} and not kept.standing.members)


def test_what_nobody_holds(keep: Callable[..., Kept]) -> None:
    kept = keep(weights(1))
    with Membership(kept.invitation, "reader") as member:
        with pytest.raises(LocalProtocolError, match="no version is held yet"):
            member.ask(lease=True)
        kept.publish(4)
        assert member.ask(lease=True).version == 4
        with pytest.raises(LocalProtocolError, match="version 9 is not held here; held: 4"):
            member.ask(lease=True, version=9)


def test_wrong_bytes_are_read_again_from_others(keep: Callable[..., Kept], way: Ways) -> None:
    """A holder whose memory is not what was summed up: found by the sums, and not believed again."""
    honest, liar = keep(weights(1)).publish(1), keep(weights(2)).publish(1)
    both = wire.Offer(1, (*liar.manifests, *honest.manifests), honest.sums)
    assert same(read(both, way), weights(1))
    with pytest.raises(IntegrityError, match="differ from what their holders said"):
        read(wire.Offer(1, liar.manifests, honest.sums), way)


def test_partners_must_hold_the_same(keep: Callable[..., Kept]) -> None:
    one = keep(weights(1))
    one.publish(1)
    other = keep(weights(2), one)
    with pytest.raises(ManifestMismatchError, match="something else under version 1"):
        other.publish(1)
    assert len(one.standing.holders) == 1


def test_a_malformed_contribution_is_its_members_failure_alone(keep: Callable[..., Kept]) -> None:
    kept = keep(weights(1))
    made = kept.publish(1)
    with Membership(kept.invitation, "broken") as member:
        for broken in (
            wire.Offer(1, made.manifests, made.sums[1:]),
            wire.Offer(1, made.manifests, made.sums.reshape(-1, 1)),
            wire.Offer(1, made.manifests, np.full(len(made.sums), np.nan)),
            wire.Offer(1, (), np.zeros(0, np.uint64)),
        ):
            with pytest.raises(RemoteProtocolError, match="broken offers version 1"):
                member.contribute([broken], 10.0)
        assert len(member.ask(lease=False, deadline_s=10.0).manifests) == 1


def test_what_only_a_member_holds_is_offered_to_nobody(keep: Callable[..., Kept]) -> None:
    """Its token lets it read: it adds holders of versions that the keeper has too, from when the keeper has them."""
    kept, other = keep(weights(1)), keep(weights(2))
    held, ahead = kept.publish(1), other.publish(2)
    with Membership(kept.invitation, "reader") as member:
        member.contribute([ahead], 10.0)
        assert member.ask(lease=False).version == 1
        with pytest.raises(LocalProtocolError, match="version 2 is not held here; held: 1"):
            member.ask(lease=False, version=2)
        kept.publish(2, weights(2))
        assert len(member.ask(lease=False).manifests) == 2
        with pytest.raises(ManifestMismatchError, match="something else under version 2"):
            member.contribute([wire.Offer(2, held.manifests, held.sums)], 10.0)
        member.contribute([wire.Offer(3, held.manifests, held.sums)], 10.0)
        own = kept.publish(3, weights(3))
        found = member.ask(lease=False)
        assert [m.holder for m in found.manifests] == [m.holder for m in own.manifests]
        assert np.array_equal(found.sums, own.sums)


@pytest.mark.parametrize("turned", [False, True])
def test_partners_offer_what_both_hold_and_forget_who_is_gone(
    keep: Callable[..., Kept], way: Ways, turned: bool
) -> None:
    """Also where they name parameters in another order."""
    one = keep(weights(1))
    one.publish(1)
    two = keep(dict(reversed(weights(1).items())) if turned else weights(1), one)
    two.publish(1)
    for kept in (one, two):
        with Membership(kept.invitation, "reader") as member:
            offer = member.ask(lease=True)
            assert len(offer.manifests) == 2
            assert same(read(offer, way), weights(1))
    one.close()
    until(lambda: len(two.standing.holders) == 1)


def test_a_holder_that_was_lost_is_named(keep: Callable[..., Kept], way: Ways) -> None:
    kept = keep(weights(1))
    offer = kept.publish(1)
    kept.pool.stop()
    with pytest.raises(PeerLostError, match=offer.manifests[0].holder.holder_id):
        read(offer, way)


def test_strangers(keep: Callable[..., Kept]) -> None:
    """A wrong token and a wrong key get nothing, and the keeper goes on."""
    kept = keep(weights(1))
    kept.publish(1)
    right = kept.invitation
    with (
        Membership(Invitation(right.endpoint, right.server_key, "guess"), "thief") as member,
        pytest.raises(HeadraceError),
    ):
        member.ask(lease=True, deadline_s=5)
    other = keep(weights(1)).invitation
    with (
        Membership(Invitation(right.endpoint, other.server_key, right.token), "thief") as member,
        pytest.raises(TransportError),
    ):
        member.ask(lease=True, deadline_s=3)
    with Membership(right, "reader") as member:
        assert member.ask(lease=False).version == 1


def test_metas_files(tmp_path: Path) -> None:
    """They come back; edited, foreign and stale ones say what they are."""
    path = tmp_path / "metas"
    made = Invitation("tcp://10.0.0.1:5", "k" * 40, "token")
    made.save(path, {"version": 3})
    assert Invitation.load(path) == made
    assert Invitation.of(made.address, made.secret) == made
    assert path.stat().st_mode & 0o777 == 0o600
    body = json.loads(path.read_text())
    for change, complaint in (
        ({"address": "10.0.0.2:5"}, "edited"),
        ({"kind": "other"}, "no metas file"),
        ({"protocol": 0}, "protocol 0"),
    ):
        path.write_text(json.dumps(body | change))
        with pytest.raises(ConfigError, match=complaint):
            Invitation.load(path)
    for text in ("", "[]", "\x00\x01", '{"a": 1}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"cannot be read|no metas file"):
            Invitation.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Invitation.load(tmp_path / "nothing")
    for address, secret in (
        ("host", made.secret),
        ("host:port", made.secret),
        ("host:5", "xx"),
        ("host:5", "é"),
    ):
        with pytest.raises(ConfigError):
            Invitation.of(address, secret)


def test_an_answer_that_comes_late_is_not_taken_for_the_next(tmp_path: Path) -> None:
    hub, token = Hub(HostSettings(socket_dir=tmp_path, permitted_uids=frozenset())), new_token()
    hub.admit(token, 1)
    with Membership(Invitation(hub.endpoint, hub.server_key, token), "patient") as member:
        with pytest.raises(TransportError, match="does it still run"):
            member.ask(lease=False, deadline_s=0.2)
        peer, _ = [hub.receive(10.0).peer for _ in range(2)]
        hub.send(peer, wire.Offer(1, (), np.zeros(0, np.uint64)))
        hub.send(peer, wire.Standing((), ()))
        assert member.standing(10.0) == wire.Standing((), ())
    hub.close()


def test_a_lease_holds_from_the_moment_it_is_given(tmp_path: Path) -> None:
    """A version that comes while another lease is given up takes nothing away from who was just promised one."""

    def replace(_version: int, pinned: bool) -> None:
        if not pinned:
            exchange.offer(offers[2])

    offers = [wire.Offer(version, (), np.zeros(0, np.uint64)) for version in (1, 2, 3)]
    with Exchange(HostSettings(socket_dir=tmp_path, permitted_uids=frozenset()), replace) as exchange:
        exchange.offer(offers[0])
        with Membership(exchange.invitation, "one") as member:
            assert member.ask(lease=True).version == 1
            exchange.offer(offers[1])
            assert member.ask(lease=True).version == 2
            assert member.ask(lease=False, version=2).version == 2
            assert member.ask(lease=False).version == 3


def test_a_partner_with_other_bytes_is_left_out_and_followed_on(keep: Callable[..., Kept]) -> None:
    partner = keep(weights(2))
    kept = keep(weights(1), partner)
    kept.publish(1)
    partner.publish(1)
    assert kept.keeper is not None
    kept.keeper._ask_partners()
    assert {holder.of_member for holder in kept.standing.holders} == {""}
    partner.publish(2, weights(3))
    kept.keeper._ask_partners()
    assert {holder.version for holder in kept.standing.holders} == {1, 2}
