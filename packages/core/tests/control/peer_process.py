"""A peer in a process of its own, run as a script: `peer_process.py MODE ENDPOINT SERVER_KEY TOKEN`."""

from __future__ import annotations

import ctypes
import os
import sys

from headrace.control import Dialer
from headrace.wire import HolderHello, Prepared

_GIL_HELD_S = 2.5


def main() -> None:
    """Say hello, then echo; in mode `hog` hold the GIL for a while first, as engines do."""
    mode, endpoint, server_key, token = sys.argv[1:]
    dialer = Dialer(endpoint, server_key)
    dialer.send(HolderHello(token=token, index=7, pid=os.getpid()))
    if mode == "hog":
        ctypes.PyDLL(None).usleep(int(_GIL_HELD_S * 1e6))
        dialer.send(Prepared())
    while True:
        dialer.send(dialer.receive())


if __name__ == "__main__":
    main()
