"""The plug-in that every SGLang process loads: a door for tickets, and a watch on models being built.

Loading it starts nothing: no thread, no socket, no device. SGLang logs what a plug-in raises and goes on without it, so
what is wrong is kept, and told to whoever asks for an update.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headrace.errors import BackendUnavailableError
from headrace_sglang.versions import SUPPORTED

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HookPoint:
    """A place in SGLang that is wrapped.

    Attributes:
        path: Dotted path.
        way: SGLang's name for the way.
        hook: What goes there.
        needed: Whether updates are impossible without it.
    """

    path: str
    way: str
    hook: Callable[..., Any]
    needed: bool = True


_registered = False


def register() -> None:
    """Wrap SGLang's hook points. Idempotent.

    In an SGLang that this adapter does not know, only the front's door is there, and says so.
    """
    global _registered  # noqa: PLW0603 - SGLang may load plug-ins more than once in a process
    if _registered:
        return
    _registered = True
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415 - SGLang calls this

    points, fault = hook_points(), why_not()
    if fault:
        logger.error("%s; this server takes no updates from Headrace", fault)
    for point in points if not fault else [points[0]]:
        if _exists(point.path):
            HookRegistry.register(point.path, _harmless(point), HookType(point.way))


def hook_points() -> list[HookPoint]:
    """Return everything that is wrapped, the front's door first."""
    from headrace_sglang import door, worker  # noqa: PLC0415 - they import SGLang's own modules

    srt = "sglang.srt"
    manager = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    return [
        HookPoint(f"{srt}.entrypoints.engine.Engine._launch_subprocesses", "after", door.open_door),
        HookPoint(f"{srt}.model_loader.loader._initialize_model", "after", worker.constructed),
        HookPoint(f"{srt}.managers.scheduler.Scheduler.__init__", "after", worker.started),
        HookPoint(f"{srt}.{manager}.update_weights_from_ipc", "around", worker.take_ticket),
        HookPoint(
            f"{srt}.managers.scheduler.Scheduler._record_scheduler_state_for_paused_engine",
            "before",
            worker.give_way,
            needed=False,
        ),
    ]


def why_not() -> str:
    """Return why this SGLang cannot be updated by Headrace, or nothing where it can."""
    import sglang  # noqa: PLC0415

    try:
        SUPPORTED.check(sglang.__version__)
    except BackendUnavailableError as error:
        return str(error)
    missing = [point.path for point in hook_points() if point.needed and not _exists(point.path)]
    if missing:
        return f"SGLang {sglang.__version__} has no {', '.join(missing)}, which headrace-sglang needs; take {SUPPORTED}"
    return ""


def _harmless(point: HookPoint) -> Callable[..., Any]:
    """Return the hook; beside SGLang's own work, it is logged when it fails, and SGLang goes on without it."""
    if point.way == "around":
        return point.hook

    @functools.wraps(point.hook)
    def hook(*args: Any, **options: Any) -> None:  # noqa: ANN401
        try:
            point.hook(*args, **options)
        except Exception:  # a server must not die of what it does not need
            logger.exception("Headrace's hook at %s failed; this server may take no updates", point.path)

    return hook


def _exists(path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return hasattr(pkgutil.resolve_name(owner), name)
    except (AttributeError, ImportError):
        return False
