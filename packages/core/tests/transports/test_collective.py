"""Meetings of a broadcast group's members, over a real store, and calls that never return."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch import distributed as dist

from headrace.errors import PeerLostError, TransferTimeoutError
from headrace.transports.collective import Meetings, _within, serve_store


def member(address: str) -> Meetings:
    host, _, port = address.rpartition(":")
    store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=5))
    return Meetings(dist.PrefixStore("meet", store))


def silent() -> None:
    pass


def listening(port: int) -> set[str]:
    """Return the addresses at which this host listens on a port, as the kernel writes them."""
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    places = [row[1].rpartition(":") for row in rows if row[3] == "0A"]
    return {host for host, _, number in places if int(number, 16) == port}


@pytest.mark.parametrize(("bind_host", "seen"), [("127.0.0.1", "0100007F"), ("*", "00000000")])
def test_the_store_listens_where_it_is_told_to(bind_host: str, seen: str) -> None:
    """It authenticates nobody, and torch by itself takes all interfaces."""
    _store, address = serve_store(bind_host, "127.0.0.1")
    assert listening(int(address.rpartition(":")[2])) == {seen}
    first, second = member(address), member(address)
    first.tell()
    second.wait(0.0, silent)


def test_members_take_turns_in_telling() -> None:
    _store, address = serve_store("127.0.0.1", "127.0.0.1")
    first, second = member(address), member(address)
    for number in range(6):
        teller, waiter = (first, second) if number % 2 else (second, first)
        timer = threading.Timer(0.02, teller.tell)
        timer.start()
        waiter.wait(5.0, silent)
        timer.join()
    first.clear()
    second.clear()
    with pytest.raises(TransferTimeoutError, match="fills the next bucket"):
        first.wait(0.4, silent)


def test_what_was_told_before_is_heard() -> None:
    _store, address = serve_store("127.0.0.1", "127.0.0.1")
    first, second = member(address), member(address)
    for _ in range(3):
        first.tell()
    for _ in range(3):
        second.wait(0.0, silent)


def test_a_wait_ends_when_it_is_told_to() -> None:
    _store, address = serve_store("127.0.0.1", "127.0.0.1")

    def cancelled() -> None:
        raise PeerLostError("cancelled")

    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="cancelled"):
        member(address).wait(60.0, cancelled)
    assert time.monotonic() - begin < 5


def test_a_call_that_never_returns_is_left_behind_at_its_deadline() -> None:
    release = threading.Event()
    with pytest.raises(TransferTimeoutError, match="a sleeper"):
        _within(0.05, lambda: release.wait(30) or None, "a sleeper")
    release.set()
    with pytest.raises(ZeroDivisionError):
        _within(5.0, lambda: 1 // 0 and None, "an error")
    _within(5.0, silent, "nothing")
