"""Planning: needs joined with haves. Pure integers; no torch, no sockets."""

from headrace.planner.digest_tables import receiver_digests
from headrace.planner.fit import casts, check_fit, uncovered_targets
from headrace.planner.planner import Planner, ReceiverNeeds
from headrace.planner.ring import choose_ring
from headrace.planner.wanted import planned_rows

__all__ = [
    "Planner",
    "ReceiverNeeds",
    "casts",
    "check_fit",
    "choose_ring",
    "planned_rows",
    "receiver_digests",
    "uncovered_targets",
]
