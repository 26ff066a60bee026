"""Which versions of vLLM this adapter knows."""

from __future__ import annotations

import re

from headrace.errors import BackendUnavailableError

OLDEST = (0, 26)
NEWEST = (0, 32)
SUPPORTED = f"{OLDEST[0]}.{OLDEST[1]}.0 to {NEWEST[0]}.{NEWEST[1]}.x"


def check_version(version: str) -> None:
    """Refuse a vLLM that this adapter was not made for; builds without a version number (`dev`) pass.

    Raises:
        BackendUnavailableError: Names the version and those that work.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return
    number = (int(found[1]), int(found[2]))
    if number != (0, 0) and not OLDEST <= number <= NEWEST:
        way_out = "upgrade vLLM" if number < OLDEST else "upgrade headrace-vllm, or take an older vLLM"
        message = f"headrace-vllm works with vLLM {SUPPORTED}; installed is {version}; {way_out}"
        raise BackendUnavailableError(message, name="vllm")
