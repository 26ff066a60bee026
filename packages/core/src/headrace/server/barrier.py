"""The barrier of each engine's commit: its own pause, or a hold of its workers, which is shorter where it can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headrace import wire
from headrace.config import UpdateSettings
from headrace.errors import PlanError
from headrace.plan import TransferPlan
from headrace.protocols import HoldingControl
from headrace.server.commit import Instance, Member

NEAR_MODES = frozenset({"device", "gathered", "staged"})


def choose_barriers(instances: Sequence[Instance], settings: UpdateSettings) -> None:
    """Note on every instance what will keep forward steps out of its commit, and why. Nothing is stopped yet.

    Raises:
        PlanError: A hold was asked for, and an engine cannot be held; gives all reasons of all engines.
    """
    against: dict[str, list[str]] = {}
    for instance in instances:
        instance.barrier, instance.barrier_why = "pause", _unasked(settings)
        if instance.barrier_why:
            continue
        found = list(obstacles(instance, settings.deadlines.enrol_s))
        if found:
            against[instance.control.address] = found
            instance.barrier_why = found[0]
        else:
            instance.barrier, instance.barrier_why = "hold", "caches are kept and all bytes are near"
    if settings.barrier == "hold" and against:
        text = "; ".join(f"{address}: {', '.join(found)}" for address, found in against.items())
        raise PlanError(f"barrier=hold cannot be had: {text}; use barrier=auto or pause", phase="plan")


def obstacles(instance: Instance, deadline_s: float) -> Iterator[str]:
    """Yield every reason why an instance cannot be held for its commit; the engine is asked for its own."""
    if isinstance(instance.control, HoldingControl):
        own = instance.control.hold_obstacle(deadline_s)
        if own is not None:
            yield own
    else:
        yield f"{type(instance.control).__name__} has no call that holds workers"
    yield from dict.fromkeys(reason for member in instance.members for reason in _of_member(member))


def _unasked(settings: UpdateSettings) -> str:
    if settings.barrier == "pause":
        return "asked for"
    return "" if settings.cache == "keep" else "caches are dropped, which takes a pause"


def _of_member(member: Member) -> Iterator[str]:
    hello, plan = member.peer.hello, member.plan
    if not isinstance(hello, wire.ReceiverHello) or plan is None:
        return
    if hello.weights_state != "old" or hello.served_version is None:
        yield "its weights are not of a confirmed version, which a pause and its end put right"
    if len(plan.opaque):
        yield f"{len(plan.opaque)} tensors go through the engine's own loader"
    if not _is_near(plan, hello.device):
        yield f"bytes are not near before the commit (ring {plan.ring.mode}, {plan.ring.why})"


def _is_near(plan: TransferPlan, device: str) -> bool:
    """Return whether a commit copies from a buffer of this worker, or on a CPU from mapped memory."""
    if plan.ring.mode == "none":
        return plan.transport == "memory" and device == "cpu"
    return plan.ring.mode in NEAR_MODES
