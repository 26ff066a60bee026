"""Names of the calls that reach vLLM's engine core and workers, known on both sides."""

from __future__ import annotations

HOLD = "headrace_hold"
OBSTACLE = "headrace_hold_obstacle"


def obstacle_of(results: object) -> str | None:
    """Return what an engine core answered to `OBSTACLE`: why it cannot be held, or None."""
    first = results[0] if isinstance(results, list) and results else None
    if not isinstance(first, dict) or "obstacle" not in first:
        return "its engine core did not say whether it can be held"
    return None if first["obstacle"] is None else str(first["obstacle"])
