"""A trainer's ranks as holders: tickets and outcomes go through the store that torch.distributed already keeps."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from headrace.config import HostSettings, host_settings
from headrace.errors import HeadraceError
from headrace.holder import Holder, HolderTicket
from headrace.protocols import SteppedSource

logger = logging.getLogger(__name__)
_numbers = itertools.count()
_FIRST_POLL_S = 0.001
_POLL_S = 0.25
JOIN_S = 15.0
_OUTCOME_POLL_S = 0.01
_CLOSED = "closed"
_OUTCOME = "outcome"


class Crew:
    """The ranks of the default process group, seen from one of them; a single process has a crew of itself.

    Nothing here is a collective. Made on every rank, in the same order where a program makes several.

    Attributes:
        rank: This process's.
        world_size: Number of ranks.
    """

    def __init__(self) -> None:
        is_group = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_group else 0
        self.world_size = dist.get_world_size() if is_group else 1
        self._prefix = f"headrace/hook/{next(_numbers)}"
        # Clones have connections of their own: waiting on one keeps nobody else from the store.
        store: Any = _get_default_store() if self.world_size > 1 else None
        self._store = store.clone() if store is not None else None
        self._rounds = 0

    def hand_out(self, tickets: Sequence[HolderTicket]) -> None:
        """Give every other rank its ticket; by rank 0."""
        for ticket in tickets:
            self.tell(f"ticket/{self._rounds}/{ticket.index}", json.dumps(asdict(ticket)))
        self._rounds += 1

    def tell(self, key: str, text: str) -> None:
        """Say something to the other ranks; by rank 0."""
        if self._store is not None:
            self._store.set(f"{self._prefix}/{key}", text)

    def dismiss(self) -> None:
        """Tell the other ranks that they are needed no more; by rank 0."""
        with suppress(RuntimeError):
            self.tell(_CLOSED, "closed")

    def heard(self, key: str) -> str | None:
        """Return what rank 0 has said under a key, or None."""
        if self._store is None or not self._store.check([f"{self._prefix}/{key}"]):
            return None
        return bytes(self._store.get(f"{self._prefix}/{key}")).decode()

    def wait_heard(
        self,
        key: str,
        deadline_s: float,
        poll_s: float,
        *,
        accept: Callable[[str], bool] = lambda _text: True,
        stop: Callable[[], bool] = lambda: False,
    ) -> str | None:
        """Wait until rank 0 says something under a key; None where it does not, or `stop` turns true.

        Asks more and more rarely, at last every `poll_s`.
        """
        limit, pause_s = time.monotonic() + deadline_s, _FIRST_POLL_S
        while time.monotonic() < limit and not stop():
            text = self.heard(key)
            if text is not None and accept(text):
                return text
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, poll_s)
        return None

    def tell_outcome(self, number: int, failures: Mapping[str, str]) -> None:
        """Say what became of a round; by rank 0. A later one replaces it: whoever is late hears that."""
        self.tell(_OUTCOME, json.dumps({"round": number, "failures": dict(failures)}))

    def wait_outcome(self, number: int, deadline_s: float) -> dict[str, str] | None:
        """Return the failures of a round, or of one after it; None where rank 0 says nothing within the deadline."""
        text = self.wait_heard(
            _OUTCOME, deadline_s, _OUTCOME_POLL_S, accept=lambda said: json.loads(said)["round"] >= number
        )
        return None if text is None else dict(json.loads(text)["failures"])


class CrewHolder:
    """The holder of a rank other than 0: a thread that serves this rank's shards, anew if its coordinator starts anew.

    Args:
        source: This rank's shards.
        crew: The ranks.
    """

    def __init__(self, source: SteppedSource, crew: Crew) -> None:
        self._source = source
        self._crew = crew
        self._host: HostSettings = host_settings()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-crew", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        rounds = 0
        try:
            while not self._closed.is_set():
                key = f"ticket/{rounds}/{self._crew.rank}"
                text = self._crew.wait_heard(key, float("inf"), _POLL_S, stop=self._closed.is_set)
                if text is None:
                    return
                rounds += 1
                self._hold(HolderTicket(**json.loads(text)))
        except RuntimeError as error:  # the store is gone with rank 0
            logger.info("rank %d holds no weights any more: %s", self._crew.rank, error)

    def _hold(self, ticket: HolderTicket) -> None:
        try:
            Holder(self._source, ticket, self._host, owns_source=False).run()
        except HeadraceError as error:
            logger.warning("the holder of rank %d ended: %s", self._crew.rank, error)

    def close(self, deadline_s: float) -> None:
        """Hold until rank 0 needs this rank no more, or is gone, at most until the deadline. Idempotent."""
        if not self._closed.is_set():
            with suppress(RuntimeError):
                self._crew.wait_heard(_CLOSED, deadline_s, _POLL_S, stop=lambda: not self._thread.is_alive())
        self._closed.set()
        self._thread.join(JOIN_S)
