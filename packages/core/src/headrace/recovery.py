"""Recovery: resumes engines that a dead updater left paused, by hand or as the guardian process.

The guardian learns over stdin, line by line, where to listen and which engines are paused; when stdin closes while some
still are, the updater is dead and it recovers each: an engine whose ranks all hold one version resumes, a mixed one
stays paused.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from secrets import token_hex

from headrace import wire
from headrace.config import EngineTarget, HostSettings, host_settings
from headrace.control.hub import Hub
from headrace.control.keys import new_token
from headrace.errors import HeadraceError, LocalProtocolError, UpdateFailedError
from headrace.protocols import EngineControl, Ticket
from headrace.registry import engine_control
from headrace.server.guardian import RECOVERY_S
from headrace.server.switchboard import Peer, Switchboard, ask_all

logger = logging.getLogger(__name__)
RETRY_S = 1.0


def recover(control: EngineControl, host: HostSettings, deadline_s: float = RECOVERY_S) -> str:
    """Resume one paused engine if its weights are whole; returns what was found, for people.

    All ranks `old`: they serve the version they report. All `new` and of one version: that version is confirmed.

    Raises:
        UpdateFailedError: The ranks disagree or are mixed; the engine stays paused.
        TransferTimeoutError: Not all receivers could be asked within the deadline.
    """
    limit = time.monotonic() + deadline_s
    board = Switchboard(Hub(host))
    try:
        peers = _enrol_free(control, board, limit)
        version = _verdict(peers)
        unconfirmed = [peer for peer in peers if getattr(peer.hello, "weights_state", "") == "new"]
        if unconfirmed and version is not None:
            ask_all(unconfirmed, wire.Finish(version=version), wire.Finished, 10.0, "finish")
        for peer in peers:
            if peer not in unconfirmed:
                peer.send(wire.Abort(reason="recovery"))
        if version is None:
            return f"{control.address}: no rank has weights yet; it stays paused until its first update"
        if unconfirmed:
            control.confirm(version, max(1.0, limit - time.monotonic()))
        control.resume(max(1.0, limit - time.monotonic()))
        return f"{control.address}: all ranks hold version {version}; resumed"
    finally:
        board.close()


def recover_all(
    targets: Sequence[EngineTarget], host: HostSettings, deadline_s: float = RECOVERY_S
) -> Iterator[tuple[EngineTarget, str | HeadraceError]]:
    """Recover engines side by side: none waits for another. Yields what became of each, as it is known.

    The threads do not keep the process: Ctrl-C need not wait for an engine that does not answer.
    """
    found: queue.SimpleQueue[tuple[EngineTarget, str | Exception]] = queue.SimpleQueue()

    def attempt(target: EngineTarget) -> None:
        try:
            with closing(engine_control(target)) as control:
                found.put((target, recover(control, host, deadline_s)))
        except Exception as error:  # noqa: BLE001 - carried to the caller's thread
            found.put((target, error))

    for target in targets:
        threading.Thread(target=attempt, args=(target,), name="headrace-recover", daemon=True).start()
    for _ in targets:
        target, outcome = found.get()
        if isinstance(outcome, Exception) and not isinstance(outcome, HeadraceError):
            raise outcome
        yield target, outcome


def _enrol_free(control: EngineControl, board: Switchboard, limit: float) -> list[Peer]:
    """Enrol until no receiver is busy with the dead update any more."""
    count = control.expected_receivers(limit - time.monotonic())
    while True:
        token, update_id = new_token(), f"recovery-{token_hex(4)}"
        board.hub.admit(token, count)
        control.enrol(
            Ticket(update_id, board.hub.endpoint, board.hub.server_key, token), limit - time.monotonic()
        )
        peers = board.arrivals(
            count,
            partial(_presents, token),
            limit - time.monotonic(),
            f"receivers of {control.address}",
        )
        busy = [peer for peer in peers if isinstance(peer.hello, wire.ReceiverHello) and peer.hello.busy_with]
        if not busy:
            return peers
        for peer in peers:
            peer.send(wire.Abort(reason="recovery waits"))
        board.forget(peers)
        if time.monotonic() + RETRY_S > limit:
            text = f"{len(busy)} receivers of {control.address} are still busy with an update"
            raise LocalProtocolError(text, name=control.address, retryable=True)
        time.sleep(RETRY_S)


def _presents(token: str, peer: Peer) -> bool:
    return peer.hello.token == token


def _verdict(peers: Sequence[Peer]) -> int | None:
    """Return the version that every rank's live tensors hold, whole.

    Raises:
        UpdateFailedError: They differ, or one is mixed.
    """
    hellos = [peer.hello for peer in peers if isinstance(peer.hello, wire.ReceiverHello)]
    held = {h.pending_version if h.weights_state == "new" else h.served_version for h in hellos}
    if len(held) == 1 and all(hello.weights_state != "mixed" for hello in hellos):
        return held.pop()
    found = ", ".join(f"{h.worker} {h.weights_state} {h.pending_version or h.served_version}" for h in hellos)
    text = f"the ranks hold different weights ({found}); the engine stays paused until the next good update"
    raise UpdateFailedError(text, weights_state="mixed", phase="recover")


def main() -> int:
    """Watch stdin until it closes, then recover what is still paused."""
    logging.basicConfig(level=logging.WARNING, format="headrace guardian: %(message)s")
    host = host_settings()
    paused: dict[str, EngineTarget] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "host" in message:
            host = HostSettings.of_plain(message["host"])
        elif "paused" in message:
            target = EngineTarget(**message["paused"])
            paused[target.address] = target
        else:
            paused.pop(message["resumed"], None)
    failures = 0
    for target, outcome in recover_all(list(paused.values()), host):
        if isinstance(outcome, HeadraceError):
            failures += 1
            logger.error("%s was not resumed: %s", target.address, outcome)
        else:
            logger.warning("%s", outcome)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
