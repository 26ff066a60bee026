"""What updates and holds need in vLLM's engine core and workers.

No ticket is taken for weights that sleep; workers stand still in a call; tokens around it keep their version.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from typing import Any

from headrace.errors import BackendUnavailableError
from headrace_vllm.calls import EXTENSION, HOLD, OBSTACLE, TRANSFER
from headrace_vllm.watch import wanted

EXECUTORS = frozenset({"UniProcExecutor", "MultiprocExecutor"})
"""Executors whose calls and forward steps reach every worker in one order."""


def watch_core() -> None:
    """Teach vLLM's workers and engine cores to be held. Idempotent; an engine that is never held notices nothing."""
    from vllm.v1.engine.core import EngineCore  # noqa: PLC0415 - vLLM's own plug-in loading calls this
    from vllm.v1.worker.worker_base import WorkerBase  # noqa: PLC0415

    if hasattr(WorkerBase, HOLD):
        return
    setattr(WorkerBase, HOLD, _stand)
    setattr(WorkerBase, OBSTACLE, _unwatched)
    EngineCore.collective_rpc = _watched(EngineCore.collective_rpc)
    if hasattr(EngineCore, "_attach_weight_version"):
        EngineCore._attach_weight_version = _with_batches_ahead(EngineCore._attach_weight_version)


def _stand(_worker: Any, update_id: str, deadline_s: float) -> dict[str, int | None]:  # noqa: ANN401
    """Stand still in a worker until its receiver lets go; returns the version that it took, if any."""
    from headrace.adapter.receivers import hold  # noqa: PLC0415 - torch is set up by vLLM first

    return {"version": hold(update_id, deadline_s)}


def _unwatched(_worker: Any) -> dict[str, str | None]:  # noqa: ANN401
    """Answer in a worker what the engine core should have: its process has not loaded the plug-in."""
    return {"obstacle": "its engine core did not load headrace-vllm's plug-in; is VLLM_PLUGINS set?"}


def _watched(original: Any) -> Any:  # noqa: ANN401
    @functools.wraps(original)
    def collective_rpc(core: Any, method: Any, *rest: Any, **options: Any) -> Any:  # noqa: ANN401
        if method == OBSTACLE:
            return [{"obstacle": obstacle(core), "workers": core.vllm_config.parallel_config.world_size}]
        if method in {TRANSFER, EXTENSION} and wanted(core.vllm_config):
            _check_awake(core)
        results = original(core, method, *rest, **options)
        if method == HOLD:
            _note_version(core, results)
        return results

    return collective_rpc


def _check_awake(core: Any) -> None:  # noqa: ANN401
    """Refuse a ticket while vLLM's sleep has taken the memory that an update would read and write."""
    if "weights" in getattr(core.model_executor, "sleeping_tags", ()):
        message = "vLLM sleeps, and its weights are in no memory; wake it up first, or its tag `weights` (`/wake_up`)"
        raise BackendUnavailableError(message, name="vllm")


def obstacle(core: Any) -> str | None:  # noqa: ANN401 - an EngineCore
    """Return why an engine core's workers cannot be held at once, or None."""
    parallel = core.vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return f"it has {parallel.pipeline_parallel_size} pipeline stages, which are never between steps together"
    executor = type(core.model_executor).__name__
    if executor not in EXECUTORS:
        return f"{executor} does not keep calls in order with forward steps"
    if core.is_scheduler_paused():
        return "it is paused, which only a pause and its resume end"
    return None


def _note_version(core: Any, results: Sequence[dict[str, int | None]]) -> None:  # noqa: ANN401
    """Label tokens with what all workers took, from the next batch on; those on their way were computed before.

    A vLLM before 0.32 labels none.
    """
    versions = {result["version"] for result in results}
    version = versions.pop() if len(versions) == 1 else None
    if version is None or not hasattr(core, "_attach_weight_version"):
        return
    ahead = core.__dict__.setdefault("_headrace_ahead", deque())
    ahead.extend([core._weight_version] * (len(core.batch_queue or ()) - len(ahead)))
    core.set_weight_version(str(version))


def _with_batches_ahead(original: Any) -> Any:  # noqa: ANN401
    """Have a batch that was handed out before a hold keep the version from before it: vLLM takes out one per call."""

    @functools.wraps(original)
    def _attach_weight_version(core: Any, outputs: Any) -> None:  # noqa: ANN401
        original(core, outputs)
        ahead = core.__dict__.get("_headrace_ahead")
        if ahead:
            version = ahead.popleft()
            for each in outputs.values():
                each.weight_version = version

    return _attach_weight_version
