"""Names of the calls that reach vLLM's engine core and workers, known on both sides."""

from __future__ import annotations

TRANSFER, EXTENSION = "init_weight_transfer_engine", "headrace_enrol"
"""The two calls that bring a ticket; the first is vLLM's own."""
HOLD = "headrace_hold"
OBSTACLE = "headrace_hold_obstacle"


def obstacle_of(results: object, num_receivers: int) -> str | None:
    """Return why an engine with so many workers in all cannot be held, or None; `results` answer `OBSTACLE`.

    One core of several data-parallel ones answers, and where they share no experts it does not know of the others.
    """
    first = results[0] if isinstance(results, list) and results else None
    if not isinstance(first, dict) or "obstacle" not in first:
        return "its engine core did not say whether it can be held"
    if first["obstacle"] is not None:
        return str(first["obstacle"])
    own = first.get("workers")
    if own != num_receivers:
        return f"its {num_receivers} workers are data-parallel engines of {own}, which one call does not reach at once"
    return None
