"""Which version an update makes, from what the engines serve."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.errors import LocalProtocolError


def next_version(served: Sequence[int | None], wished: int | None) -> int:
    """Return the version to make: the wished one, or the greatest served plus one.

    Raises:
        LocalProtocolError: The wished version would not grow.
    """
    greatest = max((version for version in served if version is not None), default=0)
    if wished is None:
        return greatest + 1
    if wished <= greatest and any(version is not None for version in served):
        message = f"version {wished} does not grow: an engine serves {greatest}; give at least {greatest + 1}"
        raise LocalProtocolError(message, weight_version=wished, phase="enrol")
    return wished
