"""Which version an update makes, from what the engines serve and the holders hold."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.errors import LocalProtocolError


def next_version(served: Sequence[int | None], wished: int | None, held: int | None = None) -> int:
    """Return the version to make: the wished one, or the greatest served or held plus one.

    Args:
        served: What each worker says it serves; an engine that was started anew serves less than others did.
        wished: What the user asked for, if anything.
        held: The newest version that the holders have made, if any.

    Raises:
        LocalProtocolError: The wished version would not grow.
    """
    greatest = max((version for version in served if version is not None), default=0)
    if held is not None and held >= greatest:
        if wished is not None and wished <= held:
            message = (
                f"version {wished} does not grow: the holders have made {held}; give at least {held + 1}"
            )
            raise LocalProtocolError(message, weight_version=wished, phase="enrol")
        greatest = held
    if wished is None:
        return greatest + 1
    if wished <= greatest and any(version is not None for version in served):
        message = f"version {wished} does not grow: an engine serves {greatest}; give at least {greatest + 1}"
        raise LocalProtocolError(message, weight_version=wished, phase="enrol")
    return wished
