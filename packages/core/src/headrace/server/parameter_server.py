"""ParameterServer: holds one source's weights and updates engines from them, as often as asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from headrace.config import HostSettings, UpdateSettings, host_settings
from headrace.control.hub import Hub
from headrace.errors import ConfigError, HeadraceError, LocalProtocolError
from headrace.plan import TransferPlan
from headrace.planner import Planner, casts
from headrace.protocols import EngineControl, WeightSource
from headrace.recipe import LoadRecipe
from headrace.registry import engine_control
from headrace.report import UpdateReport, WorkerReport
from headrace.server.broadcast import RingHost
from headrace.server.commit import Member
from headrace.server.guardian import Guardian
from headrace.server.holders import HolderPool, ProgressCallback, SourceSpec
from headrace.server.switchboard import Switchboard
from headrace.server.torchrun import Launch
from headrace.server.update import Kept, Update
from headrace.store.checkpoint import CheckpointSource
from headrace.store.tensors import TensorSource
from headrace.telemetry import Span
from headrace.types import ITEMSIZES

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
Target = str | EngineControl


class ParameterServer:
    """Brings weights of one source into serving engines. Lives in the updater; one update at a time.

    Call order: 1. construct. 2. `update`, as often as wanted. 3. `close` (or `with`).

    Args:
        checkpoint: Folder or file of safetensors; holder processes read it.
        tensors: Full named tensors of this process; read anew at every update.
        source: Any other WeightSource of this process.
        holders: Number of holders; None takes one for `direct`, one per worker for `broadcast`.
        host: Sockets of this host; None reads the environment.
        launch: torchrun's ranks as holders, this process being rank 0.

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
        launch: Launch | None = None,
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
            Guardian(),
            {},
            RingHost(self._host.bind_host),
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
            to: Engines, as `torch=http://host:port` or EngineControl objects.
            settings: Choices; None takes the defaults.
            progress: Called with (phase, bytes done, bytes in all; 0 and 0 where a phase just begins).
            choices: Fields of UpdateSettings by name, instead of `settings`.

        Raises:
            HeadraceError: It failed; `weights_state` says what the engines hold now.
        """
        settings = settings or UpdateSettings(**choices)  # type: ignore[arg-type]
        if not self._busy.acquire(blocking=False):
            raise LocalProtocolError("this parameter server is already updating", retryable=True)
        targets = [to] if isinstance(to, str | EngineControl) else list(to)
        if not targets:
            self._busy.release()
            raise ConfigError("an update needs at least one engine", name="to")
        controls: list[tuple[EngineControl, str | None]] = []
        try:
            controls += map(self._control, targets)
            return self._run(controls, settings, progress or _quiet)
        finally:
            for control, own in controls:
                if own:
                    control.close()
            self._busy.release()

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

    def _control(self, target: Target) -> tuple[EngineControl, str | None]:
        """Return a control and, where we made it, the name by which a guardian can make it too."""
        if not isinstance(target, str):
            return target, None
        control = engine_control(target)
        self._kept.guardian.start()
        return control, target

    def _run(
        self,
        controls: Sequence[tuple[EngineControl, str | None]],
        settings: UpdateSettings,
        progress: ProgressCallback,
    ) -> UpdateReport:
        begin = time.monotonic()
        update = Update(self._kept, controls, settings, self._source.metadata, self._num_holders, progress)
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
        return CheckpointSource(str(checkpoint)), SourceSpec(checkpoint=str(Path(checkpoint).resolve()))
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
        first=update.first,
        cache=settings.cache,
        verify=settings.verify,
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

    hello, plan = member.peer.hello, member.plan
    if plan is None or not hasattr(hello, "worker"):
        raise LocalProtocolError("a finished update has a plan for every receiver")
    return WorkerReport(
        worker=hello.worker,
        route=plan.route,
        transport=plan.transport,
        why=plan.why,
        ring=f"{plan.ring.mode}: {plan.ring.why}",
        num_bytes=plan.num_bytes,
        live_bytes=_live_bytes(member.recipe, plan),
        opaque_names=tuple(member.recipe.sources[int(i)].name for i in plan.opaque),
        casts=casts(member.recipe),
        stage_s=seconds("map", "build", "stage"),
        commit_s=seconds("copy", "load"),
        verify_s=seconds("verify"),
    )


def _live_bytes(recipe: LoadRecipe, plan: TransferPlan) -> int:
    """Return what the plan's copies write into live tensors, and what the loader is given for the others."""
    copies = plan.apply
    into_live = copies.dst_block < plan.num_targets
    copied = (copies.num_elements * ITEMSIZES[copies.dst_dtype])[into_live].sum()
    loaded = sum(recipe.sources.num_bytes[plan.opaque].tolist())
    return int(copied) + int(loaded)
