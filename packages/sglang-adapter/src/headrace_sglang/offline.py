"""Control of an `Engine` object of this process: what RL scripts attach to."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from headrace.adapter.calls import await_within, check_thread
from headrace.errors import ConfigError
from headrace_sglang.door import about, hand_out, pause
from headrace_sglang.pausing import pause_within

if TYPE_CHECKING:
    from headrace.protocols import EngineControl, Ticket
    from headrace.types import CacheMode

T = TypeVar("T")


def attach(engine: Any) -> EngineControl:  # noqa: ANN401 - SGLang is not a dependency
    """Return the control of an `sglang.Engine`; `ParameterServer.update` takes it.

    Update between calls of `generate`. Where the engine serves in an event loop (`async_generate`), update from another
    thread (`asyncio.to_thread`); requests in flight are kept.

    Raises:
        ConfigError: That is no engine.
        BackendUnavailableError: This SGLang cannot be updated by Headrace.
    """
    manager, loop = getattr(engine, "tokenizer_manager", None), getattr(engine, "loop", None)
    if manager is None or loop is None:
        raise ConfigError(f"{type(engine).__name__} is no SGLang engine; give an sglang.Engine", name="engine")
    about(manager)
    return EngineObjectControl(manager, loop)


class EngineObjectControl:
    """EngineControl of an `Engine` of this process; called from a thread that is not its event loop's."""

    def __init__(self, manager: Any, loop: asyncio.AbstractEventLoop) -> None:  # noqa: ANN401
        self._manager = manager
        self._loop = loop

    def check_thread(self) -> None:
        """Refuse the thread of the engine's event loop."""
        check_thread(self.address, self._loop)

    @property
    def address(self) -> str:
        """A name for messages."""
        return f"SGLang engine of {self._manager.model_path} of this process"

    def wait_ready(self, deadline_s: float) -> None:
        """Return at once: the object exists only when its engine is up."""

    def expected_receivers(self, deadline_s: float) -> int:  # noqa: ARG002 - the contract's signature
        """Return the number of schedulers over all data-parallel replicas."""
        return int(about(self._manager)["receivers"])

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:
        """Hand the ticket to every scheduler."""
        self._wait(hand_out(self._manager, ticket), deadline_s)

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        """Stop forward steps; with `recompute` requests give up their KV, and all of it is dropped."""
        pause_within(self, self._pause_once, cache, deadline_s)

    def confirm(self, version: int, deadline_s: float) -> None:
        """Have SGLang report the version."""
        from sglang.srt.managers.io_struct import UpdateWeightVersionReqInput  # noqa: PLC0415

        told = UpdateWeightVersionReqInput(new_version=str(version), abort_all_requests=False)
        self._wait(self._manager.update_weight_version(told), deadline_s)

    def resume(self, deadline_s: float) -> None:
        """Let forward steps go on."""
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput  # noqa: PLC0415

        self._wait(self._manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False)), deadline_s)

    def served_version(self, deadline_s: float) -> int | None:  # noqa: ARG002 - the contract's signature
        """Return the version that SGLang reports, or None where no update was made."""
        version: int | None = about(self._manager)["version"]
        return version

    def close(self) -> None:
        """Nothing to release."""

    def _pause_once(self, cache: CacheMode, deadline_s: float) -> str:
        return self._wait(pause(self._manager, cache), deadline_s)

    def _wait(self, call: Coroutine[Any, Any, T], deadline_s: float) -> T:
        return await_within(self.address, deadline_s, call, self._loop)
