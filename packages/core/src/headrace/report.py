"""The UpdateReport: what one update did, as data; rendering lives in `cli/`."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.telemetry import Span
from headrace.types import WorkerId


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """What one worker did in one update.

    Attributes:
        worker: Instance and rank.
        route: Route that its plan took.
        transport: Transport that moved the bytes.
        why: Why this route, one sentence.
        ring: Ring mode and why, one sentence.
        num_bytes: Bytes that reached this worker.
        live_bytes: Bytes that were written into its live tensors inside the pause.
        opaque_names: Source names that went through the engine's own loader.
        casts: `from->to` dtype casts that took place.
        left_names: Live tensors that stayed as they were, as the source has nothing for them: those of a draft model
            that is not in the checkpoint.
        stage_s: Seconds of staging while the engine served.
        commit_s: Seconds of copying and the engine's post-load step, inside the pause.
        verify_s: Seconds of checking, inside the pause.
    """

    worker: WorkerId
    route: str
    transport: str
    why: str
    ring: str
    num_bytes: int
    live_bytes: int
    opaque_names: tuple[str, ...] = ()
    casts: tuple[str, ...] = ()
    left_names: tuple[str, ...] = ()
    stage_s: float = 0.0
    commit_s: float = 0.0
    verify_s: float = 0.0

    @property
    def gb_per_s(self) -> float:
        """Live bytes over the commit, in 1e9 bytes per second."""
        return self.live_bytes / self.commit_s / 1e9 if self.commit_s else 0.0


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What one engine's users noticed of one update.

    Attributes:
        address: The engine as it was named.
        stall_s: Seconds between its pause and its resume; for a hold, from the first worker that stood to the last
            that went on.
        barrier: `pause` or `hold`.
        why: Why this barrier, one sentence.
    """

    address: str
    stall_s: float
    barrier: str = "pause"
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """The result of one successful update.

    Attributes:
        update_id: Random id.
        version: Version that every instance now serves.
        step: The trainer's step whose weights these are; None where the source has no steps.
        first: Whether this was the first update of these receivers (recording and proof included).
        cache: Cache mode.
        verify: Verification that was made; it succeeded.
        workers: One entry per worker.
        engines: One entry per engine, in the order in which they were given.
        unused_names: Source names that nothing uses.
        read_s: Seconds of reading or publishing the source.
        plan_s: Seconds of planning.
        stage_s: Seconds of staging (engine serving).
        stall_s: Longest stall of any engine.
        total_s: From the call to the end of the last instance's resume.
        overhead_s: Part of `total_s` spent neither reading, planning, staging nor stalled.
        spans: Everything that was timed, on every process of this host.
    """

    update_id: str
    version: int
    first: bool
    cache: str
    verify: str
    workers: tuple[WorkerReport, ...]
    engines: tuple[EngineReport, ...] = ()
    unused_names: tuple[str, ...] = ()
    read_s: float = 0.0
    plan_s: float = 0.0
    stage_s: float = 0.0
    stall_s: float = 0.0
    total_s: float = 0.0
    overhead_s: float = 0.0
    step: int | None = None
    spans: tuple[Span, ...] = field(default=(), repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes over all workers."""
        return sum(worker.num_bytes for worker in self.workers)

    @property
    def commit_s(self) -> float:
        """Longest commit of any worker."""
        return max((worker.commit_s for worker in self.workers), default=0.0)

    @property
    def live_bytes(self) -> int:
        """Bytes written into live tensors, over all workers."""
        return sum(worker.live_bytes for worker in self.workers)

    @property
    def gb_per_s(self) -> float:
        """Live bytes of all workers over the longest commit, in 1e9 bytes per second."""
        return self.live_bytes / self.commit_s / 1e9 if self.commit_s else 0.0
