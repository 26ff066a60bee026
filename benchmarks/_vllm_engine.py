"""A real vLLM `AsyncLLM` in a process of its own, answering streams, and its control as another process sees it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Sequence
from itertools import pairwise
from multiprocessing.managers import BaseManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from headrace.protocols import Ticket
    from headrace.types import CacheMode

START_S = 400.0
RPC_S = 300.0
NUM_STREAMS = 8
NUM_TOKENS = 1500
ROOT = Path(__file__).parents[1]


class Engine:
    """Lives in the engine's process; every method may be called from any thread.

    Args:
        options: Of `AsyncEngineArgs`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._llm, self.control = self._wait(self._make(options), START_S)
        self._times: list[list[float]] = []
        self._streams: list[asyncio.Task[None]] = []

    async def _make(self, options: dict[str, Any]) -> tuple[Any, Any]:
        from vllm import AsyncEngineArgs  # noqa: PLC0415 - only the engine's own process has it
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

        import headrace_vllm  # noqa: PLC0415

        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
        return llm, headrace_vllm.attach(llm)

    def rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a method in every worker."""
        return list(self._wait(self._llm.collective_rpc(method, args=args), RPC_S))

    def start_streams(self, count: int = NUM_STREAMS) -> None:
        """Ask `count` endless questions at once; returns when each has a token."""
        self._times = [[] for _ in range(count)]
        self._wait(self._start(), RPC_S)
        limit = time.monotonic() + RPC_S
        while not all(self._times) and time.monotonic() < limit:
            time.sleep(0.01)

    def stop_streams(self) -> list[list[float]]:
        """End them; returns when each token of each stream came, on the monotonic clock."""
        for task in self._streams:
            self._loop.call_soon_threadsafe(task.cancel)
        self._streams = []
        return self._times

    async def _start(self) -> None:
        self._streams = [asyncio.create_task(self._ask(number)) for number in range(len(self._times))]

    async def _ask(self, number: int) -> None:
        from vllm import SamplingParams  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        sampling = SamplingParams(
            temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        while True:
            prompt = {"prompt_token_ids": [10 + number, *range(100, 130)]}
            async for _ in self._llm.generate(prompt, sampling, secrets.token_hex(8)):
                self._times[number].append(time.monotonic())

    def call(self, name: str, *args: Any) -> Any:  # noqa: ANN401 - what the control returns
        """Call a method of the engine's control."""
        return getattr(self.control, name)(*args)

    def _wait(self, work: Coroutine[Any, Any, Any], deadline_s: float) -> Any:  # noqa: ANN401
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(deadline_s)


class _Manager(BaseManager):
    """Carries calls between the two processes."""


class RemoteEngine:
    """The engine as the benchmark's process sees it; its EngineControl too. Use as a context."""

    address = "vLLM engine in a process of its own"

    def __init__(self, options: dict[str, Any], environment: dict[str, str], log: Path) -> None:
        key, place = secrets.token_hex(16), log.with_suffix(".sock")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        told = json.dumps({"options": options, "place": str(place), "key": key})
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks._vllm_engine"], stdin=subprocess.PIPE, stdout=out,
                stderr=subprocess.STDOUT, env=os.environ | environment | {"PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(told.encode())
        self._process.stdin.close()
        limit = time.monotonic() + START_S
        while not place.exists():
            if self._process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"the engine did not start:\n{log.read_text()[-6000:]}")
            time.sleep(0.2)
        _Manager.register("engine")
        self._manager = _Manager(address=str(place), authkey=key.encode())
        self._manager.connect()
        self.engine: Any = self._manager.engine()  # type: ignore[attr-defined]

    def wait_ready(self, deadline_s: float) -> None:
        """As EngineControl's."""

    def expected_receivers(self, deadline_s: float) -> int:
        return int(self.engine.call("expected_receivers", deadline_s))

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:
        self.engine.call("enrol", ticket, deadline_s)

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        self.engine.call("pause", cache, deadline_s)

    def confirm(self, version: int, deadline_s: float) -> None:
        self.engine.call("confirm", version, deadline_s)

    def resume(self, deadline_s: float) -> None:
        self.engine.call("resume", deadline_s)

    def hold_obstacle(self, deadline_s: float) -> str | None:
        found: str | None = self.engine.call("hold_obstacle", deadline_s)
        return found

    def hold(self, update_id: str, deadline_s: float) -> None:
        self.engine.call("hold", update_id, deadline_s)

    def served_version(self, deadline_s: float) -> int | None:
        found: int | None = self.engine.call("served_version", deadline_s)
        return found

    def close(self) -> None:
        """As EngineControl's: the engine is not touched."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, 9)
        self._process.wait(20)


def longest_gap(times: Sequence[Sequence[float]], begin: float, end: float) -> float:
    """Return the longest time between two tokens of one stream that overlaps `[begin, end]`."""
    gaps = [
        after - before
        for stream in times
        for before, after in pairwise(stream)
        if after >= begin and before <= end
    ]
    return max(gaps, default=float("nan"))


def main() -> None:
    """Be the engine's process: told by stdin, serves until it is killed."""
    told = json.loads(sys.stdin.read())
    engine = Engine(told["options"])
    _Manager.register("engine", callable=lambda: engine)
    manager = _Manager(address=told["place"], authkey=told["key"].encode())
    manager.get_server().serve_forever()


if __name__ == "__main__":
    main()
