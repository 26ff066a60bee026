"""The coordinator's conversations: who is told what when a wait ends early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from headrace import wire
from headrace.config import host_settings
from headrace.control import Dialer, Hub, new_token
from headrace.errors import PeerLostError
from headrace.server.switchboard import Switchboard
from headrace.types import WorkerId

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def board() -> Iterator[Switchboard]:
    board = Switchboard(Hub(host_settings()))
    yield board
    board.close()


@pytest.mark.parametrize("kind", [PeerLostError, KeyboardInterrupt])
def test_who_had_come_is_sent_away_however_the_wait_ends(board: Switchboard, kind: type[BaseException]) -> None:
    """The user's Ctrl-C among them: a receiver that hears nothing stays taken by an update that is none any more."""

    def alive() -> None:
        if came:
            raise kind("enough")

    def wanted(peer: object) -> bool:
        came.append(peer)
        return True

    came: list[object] = []
    token = new_token()
    board.hub.admit(token, 2)
    with closing(Dialer(board.hub.endpoint, board.hub.server_key)) as dialer:
        dialer.send(wire.ReceiverHello("u", token, WorkerId("a", 0), 2, "cpu", "old", 0, None))
        dialer.send(wire.Aborted(weights_state="old"))
        with pytest.raises(kind):
            board.arrivals(2, wanted, 20.0, "receivers", alive)
        assert isinstance(dialer.receive(2.0), wire.Abort)
