"""ParameterServer: holds one source's weights and updates engines from them, as often as asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from headrace.config import EngineTarget, HostSettings, UpdateSettings, host_settings
from headrace.control.hub import Hub
from headrace.errors import ConfigError, HeadraceError, LocalProtocolError
from headrace.planner import Planner, casts
from headrace.protocols import EngineControl, LoopControl, WeightSource
from headrace.registry import check_transport, engine_control
from headrace.report import EngineReport, UpdateReport, WorkerReport
from headrace.server.broadcast import RingHost
from headrace.server.commit import Member
from headrace.server.guardian import Guardian
from headrace.server.holders import Crew, HolderPool, ProgressCallback, SourceSpec
from headrace.server.plan_report import PlanReport, live_bytes, plan_report
from headrace.server.switchboard import Switchboard
from headrace.server.update import Kept, Update
from headrace.store.checkpoint import CheckpointSource
from headrace.store.tensors import TensorSource
from headrace.telemetry import Span

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
Target = str | EngineTarget | EngineControl


class ParameterServer:
    """Brings weights of one source into serving engines. Lives in the updater; one update at a time.

    Call order: 1. construct. 2. `update`, as often as wanted. 3. `close` (or `with`).

    Args:
        checkpoint: Folder or file of safetensors; holder processes read it, anew at every update.
        tensors: Full named tensors of this process; read anew at every update.
        source: Any other WeightSource of this process.
        holders: Number of holders; None takes one for `direct`, one per worker for `broadcast`.
        host: Sockets of this host; None reads the environment.
        launch: Processes that hold, one holder each, this one being rank 0: torchrun's ranks, or a trainer's.

    Raises:
        ConfigError: Not exactly one source was given.
        CheckpointError: The checkpoint is damaged.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | None = None,
        source: WeightSource | None = None,
        holders: int | None = None,
        host: HostSettings | None = None,
        launch: Crew | None = None,
    ) -> None:
        if sum(given is not None for given in (checkpoint, tensors, source)) != 1:
            raise ConfigError("give exactly one of checkpoint, tensors and source")
        self._host = host or host_settings()
        self._num_holders = holders
        self._source, spec = _open(checkpoint, tensors, source)
        hub = Hub(self._host)
        board = Switchboard(hub)
        self._kept = Kept(
            board,
            HolderPool(spec, board, self._host, launch),
            Planner(),
            Guardian(self._host),
            {},
            RingHost(self._host.bind_host, self._host.require_advertised()),
        )
        self._busy = threading.Lock()

    def update(
        self,
        to: Target | Sequence[Target],
        settings: UpdateSettings | None = None,
        *,
        progress: ProgressCallback | None = None,
        **choices: object,
    ) -> UpdateReport:
        """Bring the source's weights into every engine in `to`; returns when all of them serve the new version.

        Blocking; every wait inside has a deadline of `settings.deadlines`.

        Args:
            to: Engines, as `torch=http://host:port`, EngineTarget or EngineControl objects.
            settings: Choices; None takes the defaults.
            progress: Called with (phase, bytes done, bytes in all; 0 and 0 where a phase just begins).
            choices: Fields of UpdateSettings by name, instead of `settings`.

        Raises:
            HeadraceError: It failed; `weights_state` says what the engines hold now.
        """
        settings = settings or UpdateSettings(**choices)  # type: ignore[arg-type]
        check_transport(settings.transport)
        with self._controls(to) as controls:
            if any(target for _, target in controls):
                self._kept.guardian.start()
            return self._run(controls, settings, progress or _quiet)

    def plan(
        self,
        to: Target | Sequence[Target],
        settings: UpdateSettings | None = None,
        *,
        progress: ProgressCallback | None = None,
    ) -> PlanReport:
        """Return what `update` would do, and why: the source is read, workers say what they need, nothing moves.

        Blocking, with the deadlines of an update. No engine is paused or changed; holders stay for an update.

        Raises:
            HeadraceError: The update would fail for this reason.
        """
        chosen = settings or UpdateSettings()
        check_transport(chosen.transport)
        with self._controls(to) as controls:
            update = self._make(controls, chosen, progress or _quiet)
            try:
                plan, manifests = update.plan_only()
            finally:
                self._drop_broken_holders()
            recipes = [(member.peer.receiver.worker, member.recipe) for member in update.members]
            seconds = {span.name: span.duration_s for span in update.recorder.spans}
            return plan_report(manifests, recipes, plan, version=update.version, plan_s=seconds["plan"])

    @property
    def holders(self) -> HolderPool:
        """The holders of the source, for whoever keeps what they hold open to others."""
        return self._kept.holders

    def close(self) -> None:
        """End holders, guardian and sockets; idempotent."""
        self._kept.holders.stop()
        self._kept.guardian.close()
        self._kept.switchboard.close()
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _controls(
        self, to: Target | Sequence[Target]
    ) -> Iterator[list[tuple[EngineControl, EngineTarget | None]]]:
        """Yield a control per target and, where we made it, the target from which a guardian can make it too.

        Raises:
            LocalProtocolError: This parameter server is at work.
            ConfigError: There is no target, or this thread is one's event loop.
        """
        targets = [to] if isinstance(to, Target) else list(to)
        if not targets:
            raise ConfigError("an update needs at least one engine", name="to")
        if not self._busy.acquire(blocking=False):
            raise LocalProtocolError("this parameter server is already updating", retryable=True)
        controls: list[tuple[EngineControl, EngineTarget | None]] = []
        try:
            for target in targets:
                named = EngineTarget(target) if isinstance(target, str) else target
                if isinstance(named, EngineTarget):
                    controls.append((engine_control(named), named))
                else:
                    controls.append((named, None))
                    if isinstance(named, LoopControl):
                        named.check_thread()
            yield controls
        finally:
            for control, own in controls:
                if own:
                    control.close()
            self._busy.release()

    def _make(
        self,
        controls: Sequence[tuple[EngineControl, EngineTarget | None]],
        settings: UpdateSettings,
        progress: ProgressCallback,
    ) -> Update:
        return Update(self._kept, controls, settings, self._source.metadata, self._num_holders, progress)

    def _run(
        self,
        controls: Sequence[tuple[EngineControl, EngineTarget | None]],
        settings: UpdateSettings,
        progress: ProgressCallback,
    ) -> UpdateReport:
        begin = time.monotonic()
        update = self._make(controls, settings, progress)
        try:
            update.run()
        except HeadraceError:
            self._drop_broken_holders()
            raise
        report = _report(update, settings, time.monotonic() - begin)
        logger.info(
            "version %d serves after %.3f s, stall %.3f s", report.version, report.total_s, report.stall_s
        )
        return report

    def _drop_broken_holders(self) -> None:
        """A dead holder's part is read again by new holders at the next update."""
        if any(peer.lost for peer in self._kept.holders.peers):
            self._kept.holders.stop()


def _quiet(_what: str, _done: int, _total: int) -> None:
    pass


def _open(
    checkpoint: str | Path | None,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | None,
    source: WeightSource | None,
) -> tuple[WeightSource, SourceSpec]:
    if checkpoint is not None:
        return CheckpointSource(str(checkpoint)), SourceSpec(checkpoint=str(Path(checkpoint).absolute()))
    own = TensorSource(tensors) if tensors is not None else source
    if own is None:
        raise ConfigError("there is no source")
    return own, SourceSpec(source=own)


def _report(update: Update, settings: UpdateSettings, total_s: float) -> UpdateReport:
    own = update.recorder.spans
    seconds = {name: sum(s.duration_s for s in own if s.name == name) for name in ("read", "plan", "stage")}
    stall_s = max(instance.stall_s for instance in update.instances)
    return UpdateReport(
        update_id=update.id,
        version=update.version,
        step=update.step,
        first=update.first,
        cache=settings.cache,
        verify=settings.verify,
        engines=tuple(EngineReport(i.control.address, i.stall_s, i.barrier, i.barrier_why) for i in update.instances),
        workers=tuple(_worker_report(member) for member in update.members),
        unused_names=update.unused_names(),
        read_s=seconds["read"],
        plan_s=seconds["plan"],
        stage_s=seconds["stage"],
        stall_s=stall_s,
        total_s=total_s,
        overhead_s=max(0.0, total_s - stall_s - sum(seconds.values())),
        spans=tuple(own) + tuple(_remote_spans(update)),
    )


def _remote_spans(update: Update) -> list[Span]:
    spans = [span for member in update.members for span in member.peer.spans]
    for peer in update.holder_peers:
        spans += peer.spans
        peer.spans = []
    return spans


def _worker_report(member: Member) -> WorkerReport:
    def seconds(*names: str) -> float:
        return sum(span.duration_s for span in member.peer.spans if span.name in names)

    plan = member.plan
    if plan is None:
        raise LocalProtocolError("a finished update has a plan for every receiver")
    return WorkerReport(
        worker=member.peer.receiver.worker,
        route=plan.route,
        transport=plan.transport,
        why=plan.why,
        ring=f"{plan.ring.mode}: {plan.ring.why}",
        num_bytes=plan.num_bytes,
        live_bytes=live_bytes(member.recipe, plan),
        opaque_names=tuple(member.recipe.sources[int(i)].name for i in plan.opaque),
        casts=casts(member.recipe),
        left_names=member.recipe.left,
        stage_s=seconds("map", "build", "stage"),
        commit_s=seconds("copy", "load"),
        verify_s=seconds("verify"),
    )
