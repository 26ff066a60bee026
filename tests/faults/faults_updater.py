"""An updater that stops at a chosen place, so that it can be killed there.

Arguments: CHECKPOINT TARGET PLACE [KEY AUTHORITY CERTIFICATE], the last three for an engine behind a fence.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from headrace import wire
from headrace.config import EngineTarget
from headrace.server import commit, update
from headrace.server.parameter_server import ParameterServer


def stop(*_args: object, **_options: object) -> Any:
    """Say that the place is reached, and wait for the end."""
    print("here", flush=True)  # noqa: T201 - the test reads it
    time.sleep(600)


def stop_at_finish(peers: Any, message: Any, *rest: Any) -> Any:
    return stop() if isinstance(message, wire.Finish) else ASK_ALL(peers, message, *rest)


def finish_one_rank(peers: Any, message: Any, *rest: Any) -> Any:
    if not isinstance(message, wire.Finish):
        return ASK_ALL(peers, message, *rest)
    ASK_ALL(peers[:1], message, *rest)
    return stop()


def commit_one_rank(instance: Any, deadline_s: float) -> None:
    member = instance.members[0]
    member.peer.send(wire.Commit(deadline_s=deadline_s))
    member.peer.expect(wire.Committed, deadline_s, "commit")
    stop()


ASK_ALL = commit.ask_all
PLACES = {
    "staging": (update, "gather", stop),
    "paused": (commit, "ask_all", stop),
    "committed": (commit, "ask_all", stop_at_finish),
    "half": (commit, "_commit_ranks", commit_one_rank),
}
HELD = {
    "hold-unheld": (commit, "HoldCall", stop),
    "hold-held": (commit, "ask_all", stop),
    "hold-prepared": (commit, "_commit_ranks", stop),
    "hold-half": (commit, "_commit_ranks", commit_one_rank),
    "hold-committed": (commit, "ask_all", stop_at_finish),
    "hold-finished": (commit, "ask_all", finish_one_rank),
}


def main(checkpoint: str, address: str, place: str, *access: str) -> None:
    """Update, and stop at the place."""
    target = EngineTarget(address, {"authorization": access[0]}, *access[1:]) if access else address
    with ParameterServer(checkpoint) as server:
        update_to(server, target, place)


def update_to(server: ParameterServer, target: Any, place: str) -> None:
    """Update, held where the place is one of a hold, and stop there."""
    module, name, replacement = (PLACES | HELD)[place]
    setattr(module, name, replacement)
    server.update(target, **({"cache": "keep", "barrier": "hold"} if place in HELD else {}))


if __name__ == "__main__":
    main(*sys.argv[1:])
