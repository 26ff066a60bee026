"""An updater that holds a bare engine of another process and stops at a chosen place, so that it can be killed there.

Arguments: CHECKPOINT SOCKET PLACE; SOCKET is where an `EngineDoor` passes calls on to the engine's control.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

from faults_updater import update_to

from headrace.server.parameter_server import ParameterServer

CALLS = ("wait_ready", "expected_receivers", "enrol", "pause", "confirm", "resume", "served_version",
         "hold_obstacle", "hold")  # fmt: skip


class EngineDoor:
    """Passes calls from other processes on to a control of this one, each in a thread; use as a context."""

    def __init__(self, control: Any, folder: Path) -> None:
        self.path = str(folder / "door")
        self._control = control
        self._listener = Listener(self.path)

    def __enter__(self) -> EngineDoor:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError, AuthenticationError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept(),), daemon=True).start()

    def _serve(self, connection: Any) -> None:
        with suppress(OSError, EOFError):
            name, args = connection.recv()
            try:
                connection.send((True, getattr(self._control, name)(*args)))
            except Exception as error:  # noqa: BLE001 - the caller's to see
                connection.send((False, repr(error)))


class DistantControl:
    """The HoldingControl behind an `EngineDoor`."""

    address = "distant bare engine"

    def __init__(self, path: str) -> None:
        self._path = path

    def close(self) -> None:
        """Nothing to release."""

    def call(self, name: str, *args: object) -> Any:
        with Client(self._path) as connection:
            connection.send((name, args))
            well, value = connection.recv()
        if not well:
            raise RuntimeError(value)
        return value


def _method(name: str) -> Callable[..., Any]:
    return lambda self, *args: self.call(name, *args)


for _name in CALLS:
    setattr(DistantControl, _name, _method(_name))


def main(checkpoint: str, path: str, place: str) -> None:
    """Update, and stop at the place."""
    with ParameterServer(checkpoint) as server:
        update_to(server, DistantControl(path), f"hold-{place}")


if __name__ == "__main__":
    main(*sys.argv[1:])
