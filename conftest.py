"""What holds for all tests of the repository."""

from __future__ import annotations

import signal

# A run in the background of a shell ignores SIGINT, and would hand that down to every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
