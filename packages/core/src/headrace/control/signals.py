"""What wakes an I/O thread: an eventfd for calls of this process, a monitor for its connections."""

from __future__ import annotations

import math
import os
import threading
import time
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def millis_until(moment_s: float) -> int:
    """Return how long a poll may sleep until `moment_s` of the monotonic clock, rounded up."""
    return max(0, math.ceil((moment_s - time.monotonic()) * 1000))


class Wakeup:
    """Wakes a poller from any thread."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._open = True

    def set(self) -> None:
        """Make `fd` readable; does nothing after `close`, when the number may belong to another file."""
        with self._lock:
            if self._open:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Make `fd` unreadable again."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Release `fd`; idempotent."""
        with self._lock:
            if self._open:
                self._open = False
                os.close(self.fd)


class Monitor:
    """Connection events of one socket; used by the socket's own thread only."""

    def __init__(self, watched: zmq.Socket[bytes]) -> None:
        self._watched = watched
        self.socket: zmq.Socket[bytes] = watched.get_monitor_socket(_EVENTS)

    def drain(self) -> list[tuple[int, int]]:
        """Return `(event, fd)` for everything that happened since the last call, in order."""
        happened: list[tuple[int, int]] = []
        while self.socket.poll(0, zmq.POLLIN):
            event: Any = parse_monitor_message(self.socket.recv_multipart(zmq.NOBLOCK))
            happened.append((int(event["event"]), int(event["value"])))
        return happened

    def close(self) -> None:
        """Stop watching; before the watched socket is closed."""
        self._watched.disable_monitor()
        self.socket.close(linger=0)
