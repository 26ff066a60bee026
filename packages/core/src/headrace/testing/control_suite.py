"""The conformance suite of engine controls: subclass `EngineControlTests`, say how to make yours, run pytest."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

import pytest

from headrace import wire
from headrace.config import HostSettings
from headrace.control.hub import Hub
from headrace.control.keys import new_token
from headrace.errors import ConnectError, LocalProtocolError, TransferTimeoutError, TransportError
from headrace.protocols import EngineControl, HoldingControl, Ticket
from headrace.server.holding import HoldCall
from headrace.server.switchboard import Peer, Switchboard
from headrace.types import CacheMode

_WAIT_S = 60.0


@pytest.mark.timeout(300)
class EngineControlTests:
    """What every EngineControl must do, against a running engine. Override `make_control` and `make_unreachable`.

    Attributes:
        num_workers: Workers of the engine, over all data-parallel replicas.
    """

    num_workers = 1

    def make_control(self) -> EngineControl:
        """Return a new control of a running engine that serves its first weights; override it."""
        message = f"{type(self).__name__} must override make_control"
        raise LocalProtocolError(message)

    def make_unreachable(self) -> EngineControl | None:
        """Return a control of an address where nothing listens; None where engines have no address."""
        return None

    def is_paused(self) -> bool | None:
        """Return whether the engine is paused; None where it cannot be asked."""
        return None

    @pytest.fixture
    def control(self) -> Iterator[EngineControl]:
        """The control under test; the engine runs afterwards."""
        made = self.make_control()
        yield made
        made.resume(_WAIT_S)
        made.close()

    @pytest.fixture
    def board(self, tmp_path: Path) -> Iterator[Switchboard]:
        """A coordinator."""
        made = Switchboard(Hub(HostSettings(socket_dir=tmp_path, permitted_uids=frozenset({os.getuid()}))))
        yield made
        made.close()

    def test_it_is_ready(self, control: EngineControl) -> None:
        """Asked twice; it has a name."""
        assert isinstance(control, EngineControl)
        assert control.address
        control.wait_ready(_WAIT_S)
        control.wait_ready(_WAIT_S)

    def test_it_knows_its_workers(self, control: EngineControl) -> None:
        """All of them, also of other replicas."""
        assert control.expected_receivers(_WAIT_S) == self.num_workers

    def test_it_reports_a_version(self, control: EngineControl) -> None:
        """A number that does not change by asking."""
        version = control.served_version(_WAIT_S)
        assert version is None or version >= 0
        assert control.served_version(_WAIT_S) == version

    @pytest.mark.parametrize("cache", ["recompute", "keep"])
    def test_pause_and_resume_are_idempotent(self, control: EngineControl, cache: CacheMode) -> None:
        """Also a resume without a pause."""
        control.resume(_WAIT_S)
        for _ in range(2):
            control.pause(cache, _WAIT_S)
            assert self.is_paused() in (None, True)
        control.wait_ready(_WAIT_S)
        for _ in range(2):
            control.resume(_WAIT_S)
            assert self.is_paused() in (None, False)

    def test_a_hold_lasts_until_its_receivers_let_go(self, control: EngineControl, board: Switchboard) -> None:
        """One for an update that is not here ends at once; one for an update that is, when that is over."""
        if not isinstance(control, HoldingControl):
            pytest.skip("this engine cannot be held")
        assert control.hold_obstacle(_WAIT_S) is None
        begin = time.monotonic()
        control.hold("no such update", _WAIT_S)
        assert time.monotonic() - begin < _WAIT_S / 2
        peers = self._enrol(control, board, "the-update")
        call = HoldCall(control, "the-update", _WAIT_S)
        time.sleep(1.0)
        call.check()
        self._dismiss(peers)
        call.wait(_WAIT_S)

    def test_a_ticket_reaches_every_worker(self, control: EngineControl, board: Switchboard) -> None:
        """Every worker dials once, says who it is, and is free again after an abort."""
        for _ in range(2):
            peers = self._enrol(control, board)
            workers = [peer.hello.worker for peer in peers if isinstance(peer.hello, wire.ReceiverHello)]
            assert len({(worker.instance, worker.rank) for worker in workers}) == self.num_workers
            assert not any(getattr(peer.hello, "busy_with", None) for peer in peers)
            self._dismiss(peers)

    def test_a_second_coordinator_hears_who_is_first(self, control: EngineControl, board: Switchboard) -> None:
        """While one update has the workers, another is told which."""
        first = self._enrol(control, board, "the-first")
        second = self._enrol(control, board, "the-second")
        assert {getattr(peer.hello, "busy_with", None) for peer in second} == {"the-first"}
        self._dismiss(second, answer=False)
        self._dismiss(first)

    def test_a_wrong_address_is_said_in_time(self) -> None:
        """With the address in the message, for every call."""
        control = self.make_unreachable()
        if control is None:
            pytest.skip("this engine has no address")
        begin = time.monotonic()
        with pytest.raises(ConnectError) as caught:
            control.wait_ready(1.0)
        assert control.address in str(caught.value)
        for call in (control.expected_receivers, control.resume, control.served_version):
            with pytest.raises(TransportError):
                call(1.0)
        assert time.monotonic() - begin < 20
        control.close()

    def test_a_deadline_is_kept(self, control: EngineControl) -> None:
        """A call with hardly any time ends, well or with a timeout, and the next one works."""
        begin = time.monotonic()
        with suppress(TransferTimeoutError, ConnectError):
            control.served_version(0.001)
        assert time.monotonic() - begin < 10
        control.served_version(_WAIT_S)

    def _enrol(self, control: EngineControl, board: Switchboard, update_id: str = "") -> list[Peer]:
        token = new_token()
        board.hub.admit(token, self.num_workers)
        ticket = Ticket(update_id or token_hex(4), board.hub.endpoint, board.hub.server_key, token)
        control.enrol(ticket, _WAIT_S)
        return board.arrivals(self.num_workers, lambda peer: peer.hello.token == token, _WAIT_S, "receivers")

    def _dismiss(self, peers: list[Peer], *, answer: bool = True) -> None:
        for peer in peers:
            peer.send(wire.Abort(reason="test"))
            if answer:
                assert peer.expect(wire.Aborted, _WAIT_S, "abort").weights_state == "old"
