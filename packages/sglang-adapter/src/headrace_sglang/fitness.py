"""Whether a scheduler can be updated as it runs now; what cannot is refused before anything is touched."""

from __future__ import annotations

from typing import Any

from headrace.errors import BackendUnavailableError


def check_fitness(updater: Any) -> None:  # noqa: ANN401 - a SchedulerWeightUpdaterManager
    """Refuse what an update could not keep whole.

    Raises:
        BackendUnavailableError: Names the reason and the way out.
    """
    scheduler, runner = updater.scheduler, updater.tp_worker.model_runner
    for fault in (_mode(scheduler), _moment(updater), _caches(runner)):
        if fault:
            raise BackendUnavailableError(fault, name="sglang")


def _mode(scheduler: Any) -> str:  # noqa: ANN401
    """Return why a scheduler of this kind cannot be paused or described by one recipe."""
    arguments = scheduler.server_args
    if arguments.pp_size > 1:
        return "SGLang's pipeline-parallel schedulers do not pause; start it with --pp-size 1"
    if scheduler.enable_pdmux:
        return "SGLang does not pause while it multiplexes prefill and decode; start it without --enable-pdmux"
    if arguments.disaggregation_mode != "null":
        return "a disaggregated server keeps KV of the old weights over a pause; start it without --disaggregation-mode"
    if arguments.enable_eplb:
        return "experts that move while SGLang serves cannot be followed; start it without --enable-eplb"
    return ""


def _moment(updater: Any) -> str:  # noqa: ANN401
    """Return why it cannot be updated just now."""
    if updater.offload_tags:
        return f"SGLang has released memory ({', '.join(sorted(updater.offload_tags))}); resume it first"
    if updater._session is not None:
        return "an update of SGLang's own is open; call /end_weight_update first"
    return ""


def _caches(runner: Any) -> str:  # noqa: ANN401
    """Return SGLang's own objection: weights that are shared, or kept in forms that no update refreshes."""
    from sglang.srt.model_executor.model_runner_components import weight_updater  # noqa: PLC0415

    try:
        runner.weight_updater._assert_weight_cache_inactive("an update by Headrace")
    except RuntimeError as error:
        return str(error)
    return weight_updater._unsupported_derived_weight_cache_error(runner.model) or ""
