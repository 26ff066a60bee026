"""Control of an `LLM` or `AsyncLLM` object of this process: what RL scripts attach to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from headrace.adapter.calls import await_within, call_within, check_thread, running_loop, version_number
from headrace.errors import ConfigError
from headrace_vllm.calls import EXTENSION, HOLD, OBSTACLE, TRANSFER, obstacle_of

if TYPE_CHECKING:
    from headrace.protocols import EngineControl, Ticket
    from headrace.types import CacheMode

T = TypeVar("T")


def attach(llm: Any, loop: asyncio.AbstractEventLoop | None = None) -> EngineControl:  # noqa: ANN401 - vLLM is an extra
    """Return the control of an engine object of this process; `ParameterServer.update` takes it.

    For an `LLM`, update between calls of `generate`. For an `AsyncLLM`, call this in its event loop (or give `loop`)
    and update from another thread (`asyncio.to_thread`); requests in flight are kept.

    Args:
        llm: An `LLM`, `LLMEngine` or `AsyncLLM`.
        loop: The event loop that an `AsyncLLM` serves in; None takes the running one.

    Raises:
        ConfigError: The engine was not started for Headrace, its object reaches only some of its workers, or an
            `AsyncLLM` is given outside of its loop.
    """
    config = getattr(llm, "vllm_config", None) or getattr(
        getattr(llm, "llm_engine", None), "vllm_config", None
    )
    if config is None:
        message = f"{type(llm).__name__} is no vLLM engine; give an LLM, an LLMEngine or an AsyncLLM"
        raise ConfigError(message, name="llm")
    method = _enrol_method(config)
    is_async = asyncio.iscoroutinefunction(llm.collective_rpc)
    _check_reach(config.parallel_config, is_async=is_async)
    if is_async:
        return AsyncLlmControl(llm, config, method, loop or running_loop("an AsyncLLM"))
    return LlmControl(getattr(llm, "llm_engine", llm), config, method)


def _enrol_method(config: Any) -> str:  # noqa: ANN401 - a VllmConfig
    transfer = config.weight_transfer_config
    if transfer is not None and transfer.backend == "headrace":
        return TRANSFER
    if (config.parallel_config.worker_extension_cls or "").startswith("headrace_vllm."):
        return EXTENSION
    message = (
        'this engine was not started for Headrace; give LLM(..., weight_transfer_config={"backend": "headrace"}) '
        "or worker_extension_cls='headrace_vllm.WorkerExtension'"
    )
    raise ConfigError(message, name="llm")


def _check_reach(parallel: Any, *, is_async: bool) -> None:  # noqa: ANN401 - a ParallelConfig
    """Refuse an object that reaches only some of the workers that vLLM counts to its engine."""
    lb = [name for name in ("data_parallel_external_lb", "data_parallel_hybrid_lb") if getattr(parallel, name, False)]
    size, world = parallel.data_parallel_size, parallel.world_size
    if lb:
        reason = f"this engine runs with {lb[0]}: its object reaches only some of the data-parallel engines"
    elif size > 1 and (parallel.data_parallel_rank_local is not None or not is_async):
        reason = f"this object is the front of one of {size} data-parallel engines (VLLM_DP_SIZE), and of no other"
    elif world > 1 and parallel.distributed_executor_backend == "external_launcher":
        reason = f"an external launcher starts this engine's {world} workers, and its object reaches only its own"
    else:
        return
    message = f"{reason}; let vLLM start all workers and balance the load itself, or start independent engines"
    raise ConfigError(message, name="llm")


def _call_of(method: str, ticket: Ticket) -> dict[str, Any]:
    fields = asdict(ticket)
    return {"init_info": fields} if method == TRANSFER else fields


class _Attached:
    """What both engines share: who they are."""

    def __init__(self, config: Any, method: str) -> None:  # noqa: ANN401
        self._config = config
        self._method = method
        self._version: int | None = None

    @property
    def address(self) -> str:
        """A name for messages."""
        return f"vLLM engine {self._config.instance_id} of this process"

    def wait_ready(self, deadline_s: float) -> None:
        """Return at once: the object exists only when its engine is up."""

    def expected_receivers(self, deadline_s: float) -> int:  # noqa: ARG002 - the contract's signature
        """Return the number of workers over all data-parallel replicas."""
        return int(self._config.parallel_config.world_size_across_dp)

    def close(self) -> None:
        """Nothing to release."""


class LlmControl(_Attached):
    """EngineControl of an `LLM`: no request is in flight between its calls; queued ones of an `LLMEngine` are kept.

    It holds no workers: nobody waits for a token between its calls, and a worker may be the user's own process, which
    a hold that goes wrong would end.
    """

    def __init__(self, engine: Any, config: Any, method: str) -> None:  # noqa: ANN401
        super().__init__(config, method)
        self._engine = engine

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:
        """Hand the ticket to every worker."""
        kwargs = _call_of(self._method, ticket)
        self._within(deadline_s, lambda: self._engine.collective_rpc(self._method, kwargs=kwargs))

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        """Stop the scheduler; with `recompute` KV and prefix caches are dropped."""
        clear = cache == "recompute"
        self._within(deadline_s, lambda: self._core("pause_scheduler", "keep", clear))

    def confirm(self, version: int, deadline_s: float) -> None:
        """Have vLLM report the version; one before 0.29 knows none, and this control keeps it."""
        self._version = version
        if hasattr(self._engine, "set_weight_version"):
            self._within(deadline_s, lambda: self._engine.set_weight_version(str(version)))

    def resume(self, deadline_s: float) -> None:
        """Let the scheduler go on."""
        self._within(deadline_s, lambda: self._core("resume_scheduler"))

    def served_version(self, deadline_s: float) -> int | None:
        """Return the version that vLLM reports, or None where no update was made."""
        if not hasattr(self._engine, "get_weight_version"):
            return self._version
        return version_number(self._within(deadline_s, self._engine.get_weight_version))

    def _core(self, name: str, *args: object) -> object:
        """Call the engine core, in this process or in its own."""
        client = self._engine.engine_core
        if hasattr(client, "call_utility"):
            return client.call_utility(name, *args)
        return getattr(client.engine_core, name)(*args)

    def _within(self, deadline_s: float, call: Callable[[], T]) -> T:
        """Run a blocking call of vLLM, which gets no time-out of its own: see `VllmControl`."""
        return call_within(self.address, deadline_s, call)


class AsyncLlmControl(_Attached):
    """EngineControl of an `AsyncLLM`; called from threads other than its event loop's."""

    def __init__(self, engine: Any, config: Any, method: str, loop: asyncio.AbstractEventLoop) -> None:  # noqa: ANN401
        super().__init__(config, method)
        self._engine = engine
        self._loop = loop

    def check_thread(self) -> None:
        """Refuse the thread of the engine's event loop."""
        check_thread(self.address, self._loop)

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:
        """Hand the ticket to every worker."""
        self._wait(
            self._engine.collective_rpc(self._method, kwargs=_call_of(self._method, ticket)), deadline_s
        )

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        """Freeze requests; with `recompute` their KV and all prefix caches are dropped."""
        self._wait(self._engine.pause_generation(mode="keep", clear_cache=cache == "recompute"), deadline_s)

    def hold_obstacle(self, deadline_s: float) -> str | None:
        """Return why this engine's workers cannot be held, as its engine core says."""
        results = self._wait(self._engine.collective_rpc(OBSTACLE), deadline_s)
        return obstacle_of(results, self.expected_receivers(deadline_s))

    def hold(self, update_id: str, deadline_s: float) -> None:
        """Have every worker stand still, between the same two forward steps, until its receiver lets go."""
        told = {"update_id": update_id, "deadline_s": deadline_s}
        self._wait(self._engine.collective_rpc(HOLD, kwargs=told), deadline_s)

    def confirm(self, version: int, deadline_s: float) -> None:
        """Have vLLM report the version; one before 0.29 knows none, and this control keeps it."""
        self._version = version
        if hasattr(self._engine, "update_weight_version"):
            self._wait(self._engine.update_weight_version(str(version)), deadline_s)

    def resume(self, deadline_s: float) -> None:
        """Let forward steps go on."""
        self._wait(self._engine.resume_generation(), deadline_s)

    def served_version(self, deadline_s: float) -> int | None:
        """Return the version that vLLM reports, or None where no update was made."""
        if not hasattr(self._engine, "get_weight_version"):
            return self._version
        return version_number(self._wait(self._engine.get_weight_version(), deadline_s))

    def _wait(self, call: Coroutine[Any, Any, T], deadline_s: float) -> T:
        return await_within(self.address, deadline_s, call, self._loop)
