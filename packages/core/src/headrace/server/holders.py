"""HolderPool: the holders of one source - in this process, in processes of their own, or torchrun ranks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from headrace import wire
from headrace.config import Deadlines, HostSettings
from headrace.control.keys import new_token
from headrace.errors import (
    HeadraceError,
    LocalProtocolError,
    RemoteProtocolError,
    StepMissedError,
    UpdateFailedError,
)
from headrace.holder import Holder, HolderTicket
from headrace.manifest import HolderAddress, Manifest
from headrace.protocols import SteppedSource, WeightSource
from headrace.segments.folders import sweep
from headrace.server.holder_process import HolderProcess
from headrace.server.startup import LONGEST_STARTUP_S, STARTUP_S
from headrace.server.switchboard import Peer, Switchboard, ask_all, tell
from headrace.store.checkpoint import CheckpointSource
from headrace.types import I64

logger = logging.getLogger(__name__)
KEPT_LAYOUTS = 2
STEP_ATTEMPTS = 8
PROCESS_END_S = 5.0
THREAD_END_S = 60.0
"""A holder in this process unlocks its pages, tens of GB, and cannot be killed: interrupted by the interpreter's end it
would take the process down with an abort."""
ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """What holders hold: a checkpoint folder that each reads a part of, or a source in this process."""

    checkpoint: str | None = None
    source: WeightSource | None = None


class Crew(Protocol):
    """The processes that hold, one holder each, where others have started them; this process is their rank 0."""

    @property
    def world_size(self) -> int:
        """Number of processes, this one included."""
        ...

    def hand_out(self, tickets: Sequence[HolderTicket]) -> None:
        """Give every other rank its ticket, by `index`; may be called again, for holders that were lost."""
        ...


class HolderPool:
    """Starts holders, tells them what to publish, and ends them. Used by one thread.

    With a checkpoint, every holder is a process that reads its part. With a source in this process, holder 0 is a
    thread here and holds everything; further holders are processes that only pass broadcasts on. With a crew (ranks of
    torchrun or of a trainer) its processes are the holders, this one included.

    Attributes:
        spares: Processes that were started before; new holders are taken from them while there are some.
        peers: The live holders' conversations, by index.
        published: What they hold of the version that was published last, by index.
        newest: No version up to this one can be published by them any more; None where they have made none.
    """

    def __init__(
        self, spec: SourceSpec, switchboard: Switchboard, host: HostSettings, crew: Crew | None = None
    ) -> None:
        self._spec = spec
        self._crew = crew
        self._switchboard = switchboard
        self._host = host
        self.spares: list[HolderProcess] = []
        self._processes: list[HolderProcess] = []
        self._starting: dict[int, HolderProcess] = {}
        self._threads: list[threading.Thread] = []
        self.peers: list[Peer] = []
        self.newest: int | None = None
        self.published: list[Manifest] = []
        self._known: dict[str, Manifest] = {}

    def ensure(self, count: int) -> None:
        """Have at least `count` live holders; a checkpoint is divided again when their number changes.

        Raises:
            PeerLostError: A holder's process ended before it was up.
            TransferTimeoutError: A holder did not come up.
        """
        count = self._crew.world_size if self._crew else count
        if len(self.peers) >= count and not any(peer.lost for peer in self.peers):
            return
        self.stop()
        tickets = [self._ticket(index) for index in range(count)]
        if self._crew is not None:
            self._crew.hand_out(tickets[1:])
            tickets_here = tickets[:1]
        else:
            tickets_here = tickets
        for ticket in tickets_here:
            self._start(ticket, count)
        self.peers = self._await({ticket.token for ticket in tickets})

    def _await(self, tokens: set[str]) -> list[Peer]:
        """Return who dials in with these tokens, by index; processes are given their own time to start."""

        def is_ours(peer: Peer) -> bool:
            if not isinstance(peer.hello, wire.HolderHello) or peer.hello.token not in tokens:
                return False
            self._starting.pop(peer.hello.index, None)
            return True

        limit_s = LONGEST_STARTUP_S if self._starting else STARTUP_S
        found = self._switchboard.arrivals(len(tokens), is_ours, limit_s, "holders", self._check_starting)
        return sorted(found, key=lambda peer: peer.key)

    def _check_starting(self) -> None:
        for process in self._starting.values():
            process.check()

    @property
    def addresses(self) -> tuple[HolderAddress, ...]:
        """How to reach the holders' memory, by index; empty before they have published anything."""
        return tuple(manifest.holder for manifest in self.published)

    def publish(
        self, version: int, deadlines: Deadlines, progress: ProgressCallback | None = None
    ) -> list[Manifest]:
        """Have every holder complete `version`; returns their manifests by holder index.

        Raises:
            UpdateFailedError: A holder could not; earlier versions are untouched.
        """
        self._watch_progress(progress)
        limit_s = deadlines.read_s
        order = wire.Publish(version=version, deadline_s=limit_s, known_layouts=tuple(self._known))
        answers = ask_all(self.peers, order, wire.Published, limit_s, "read")
        self.newest = version
        self.published = [self._manifest(answers[peer.key], version) for peer in self.peers]
        return self.published

    def _watch_progress(self, progress: ProgressCallback | None) -> None:
        """Add up what the holders say of how far they are with reading.

        The callback runs in the thread that reads the hub, which must not end by it.
        """
        done = dict.fromkeys((peer.key for peer in self.peers), (0, 0))

        def tell() -> None:
            nonlocal progress
            if progress is None:
                return
            try:
                progress("read", sum(d for d, _ in done.values()), sum(t for _, t in done.values()))
            except Exception:
                logger.exception("the progress callback failed; this update goes on without it")
                progress = None

        def watch(peer: Peer) -> Callable[[wire.Progress], None]:
            def told(message: wire.Progress) -> None:
                done[peer.key] = (message.done_bytes, message.total_bytes)
                tell()

            return told

        for peer in self.peers:
            peer.on_progress = watch(peer)

    @property
    def is_stepped(self) -> bool:
        """Whether versions are only placed by `publish`, and filled when it is known what of them is needed."""
        return isinstance(self._spec.source, SteppedSource)

    def fill(
        self, version: int, rows: Sequence[I64], deadlines: Deadlines, progress: ProgressCallback | None = None
    ) -> int:
        """Have every holder copy these rows of its regions, all of one step of the trainer; returns that step.

        Raises:
            UpdateFailedError: A holder could not, or the ranks kept missing each other's steps.
        """
        source = self._spec.source
        if not isinstance(source, SteppedSource):
            raise LocalProtocolError("this source has no steps", phase="read")
        rows_of = {peer.key: np.asarray(chosen) for peer, chosen in zip(self.peers, rows, strict=True)}
        self._watch_progress(progress)
        for attempt in range(STEP_ATTEMPTS):
            step = source.offer(attempt)

            def order(peer: Peer, step: int = step) -> wire.Fill:
                return wire.Fill(version=version, step=step, rows=rows_of[peer.key], deadline_s=deadlines.read_s)

            try:
                ask_all(self.peers, order, wire.Filled, deadlines.read_s, "read")
            except UpdateFailedError as error:
                missed = {failure.type_name for failure in error.failures.values()} == {StepMissedError.__name__}
                if not missed or attempt == STEP_ATTEMPTS - 1:
                    raise
                logger.debug("step %d was missed: %s", step, error)
            else:
                break
        return step

    def _manifest(self, answer: wire.Published, version: int) -> Manifest:
        """Return what a holder published; equal layouts share their tables, so that plans are found again."""
        known = self._known.pop(answer.layout, answer.manifest)
        if known is None:
            raise RemoteProtocolError("a holder named a layout that it never sent", phase="read")
        self._known[answer.layout] = known
        while len(self._known) > KEPT_LAYOUTS * len(self.peers):
            del self._known[next(iter(self._known))]
        return known.of_version(version)

    def release(self, version: int) -> None:
        """Have every holder drop a version that came to nothing, so that its number can be used again."""
        tell(self.peers, wire.Release(version=version))
        if self.newest == version:
            self.newest = version - 1

    def check(self) -> None:
        """Do nothing while all holders are there.

        Raises:
            PeerLostError: One is lost, and with it what it held.
        """
        for peer in self.peers:
            peer.check("keeping what it holds")

    def settle(self, deadline_s: float) -> None:
        """Wait until no holder works for a failed update any more; end them all if one does not come to rest."""
        nonce = new_token()
        told = tell(self.peers, wire.Settle(nonce=nonce))
        limit = time.monotonic() + deadline_s
        if told != self.peers or not all(peer.settle(nonce, limit) for peer in told):
            logger.warning("a holder did not come to rest; the next update starts new ones")
            self.stop()

    def stop(self) -> None:
        """End all holders, whatever state they are in, and remove what they left behind; idempotent."""
        tell(self.peers, wire.Shutdown())
        limit = time.monotonic() + PROCESS_END_S
        for process in self._processes:
            process.end(0.0 if process in self._starting.values() else limit)
        for thread in self._threads:
            thread.join(THREAD_END_S)
            if thread.is_alive():
                logger.warning("%s did not end within %.0f s and is left behind", thread.name, THREAD_END_S)
        self._switchboard.forget(self.peers)
        self._processes, self._threads, self.peers, self._known, self.newest = [], [], [], {}, None
        self.published = []
        self._starting.clear()
        sweep(self._host.socket_dir)

    def _ticket(self, index: int) -> HolderTicket:
        token = new_token()
        hub = self._switchboard.hub
        hub.admit(token, 1)
        return HolderTicket(hub.endpoint, hub.server_key, token, index)

    def _start(self, ticket: HolderTicket, count: int) -> None:
        if self._spec.source is not None and ticket.index == 0:
            self._start_here(Holder(self._spec.source, ticket, self._host, owns_source=False))
            return
        if self._crew is not None and self._spec.checkpoint is not None:
            source = CheckpointSource(self._spec.checkpoint, parts=count, part=ticket.index)
            self._start_here(Holder(source, ticket, self._host))
            return
        spec = {
            "ticket": asdict(ticket),
            "checkpoint": self._spec.checkpoint,
            "parts": count,
            "part": ticket.index,
            "host": self._host.plain(),
            "log_level": logging.getLevelName(logger.getEffectiveLevel()),
        }
        process = self.spares.pop() if self.spares else HolderProcess()
        self._processes.append(process)
        self._starting[ticket.index] = process
        process.hold(spec, f"the process of holder {ticket.index}")

    def _start_here(self, holder: Holder) -> None:
        thread = threading.Thread(target=_contained, args=(holder,), name="headrace-holder-0", daemon=True)
        self._threads.append(thread)
        thread.start()


def _contained(holder: Holder) -> None:
    try:
        holder.run()
    except HeadraceError as error:
        logger.warning("the holder in this process ended: %s", error)
