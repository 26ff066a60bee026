"""The embedded engine: requests in, tokens out, one step at a time, with a pause that keeps requests."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator
from queue import SimpleQueue
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from headrace.embedded.fleet import AnyReply, Fleet
from headrace.embedded.generation import Event, Finished, Request, Sampling, Sink, TokenMade, version_conflict
from headrace.embedded.messages import (
    Command,
    Done,
    DropCaches,
    Enrol,
    Fingerprints,
    GetFingerprints,
    GetStatus,
    Ready,
    Step,
    Stepped,
    WorkerStatus,
)
from headrace.errors import (
    ConfigError,
    HeadraceError,
    IntegrityError,
    LocalProtocolError,
    TransferTimeoutError,
)

if TYPE_CHECKING:
    from headrace.embedded.settings import EngineSettings
    from headrace.protocols import Ticket
    from headrace.types import CacheMode

_LEAST_REPLY_S = 5.0
"""No worker is given up for a late answer before this, however short the caller's deadline is."""

State = Literal["starting", "ready", "failed", "stopped"]


class EmbeddedEngine:
    """A transformers model served by worker processes. All methods may be called from any thread.

    Call order: 1. `start`. 2. `wait_ready`. 3. everything else. 4. `stop`.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.instance = token_hex(4)
        self._fleet = Fleet(settings, self.instance, self._on_loss)
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Request] = {}
        self._ended: list[int] = []
        self._state: State = "starting"
        self._error: HeadraceError | None = None
        self._paused = settings.load_format == "dummy"
        self._is_stepping = False
        self._mixed_steps = 0
        self._model: Ready | None = None
        self._loop = threading.Thread(target=self._run, daemon=True, name="engine-loop")

    def start(self) -> None:
        """Start the workers and the loop; returns at once."""
        self._fleet.start()
        self._loop.start()

    def wait_ready(self, deadline_s: float) -> None:
        """Wait until the model is loaded on all ranks.

        Raises:
            HeadraceError: A worker failed to start.
            TransferTimeoutError: Not within the deadline.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._state != "starting", deadline_s):
                raise TransferTimeoutError(
                    f"the engine is still loading after {deadline_s:g} s", retryable=True
                )
            self._check_alive()

    def submit(self, prompt: list[int], sampling: Sampling, sink: Sink) -> Request:
        """Take a request, also while paused; its events go to `sink` from the loop's thread. Returns at once.

        Raises:
            ConfigError: The prompt does not fit the model.
            HeadraceError: The engine has failed or was stopped.
        """
        with self._changed:
            _check_prompt(prompt, sampling, self._check_ready())
            request = Request(next(self._numbers), list(prompt), sampling, sink)
            self._waiting[request.number] = request
            self._changed.notify_all()
        return request

    def generate(self, prompt: list[int], sampling: Sampling) -> Generator[TokenMade, None, None]:
        """Yield tokens as they are made; closing the iterator cancels the request.

        Raises:
            HeadraceError: The request failed.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        request = self.submit(prompt, sampling, events.put)
        try:
            while not isinstance(event := events.get(), Finished):
                yield event
        finally:
            self.cancel(request)
        if event.error is not None:
            raise event.error

    def cancel(self, request: Request) -> None:
        """Forget a request; it gets no token after this call but the one of a running step. Idempotent."""
        with self._changed:
            self._end(request, Finished("cancelled"))

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        """Return when no step runs and none will start; requests stay. Idempotent.

        Args:
            cache: With `recompute` all KV caches are dropped now, and made again from the tokens at resume.
            deadline_s: Longest wait for the running step.

        Raises:
            TransferTimeoutError: The step did not end in time; the engine goes on.
        """
        end = time.monotonic() + deadline_s
        if not self._turn.acquire(timeout=deadline_s):
            raise TransferTimeoutError(
                f"another pause or resume holds the engine for {deadline_s:g} s", retryable=True
            )
        try:
            self._stop_stepping(end, deadline_s)
            if cache == "recompute":
                self._drop_caches(max(_LEAST_REPLY_S, end - time.monotonic()))
        finally:
            self._turn.release()

    def resume(self) -> None:
        """Let steps go on. Idempotent.

        Raises:
            LocalProtocolError: The weights are not of one confirmed version; the engine stays paused.
        """
        with self._turn:
            with self._changed:
                self._check_ready()
                if not self._paused:
                    return
            _check_one_version(self._ask(GetStatus(), WorkerStatus))
            with self._changed:
                self._paused = False
                self._changed.notify_all()

    def enrol(self, ticket: Ticket) -> None:
        """Hand the ticket to every worker's receiver.

        Raises:
            HeadraceError: A receiver refused it, or the engine has failed.
        """
        self._ask(Enrol(ticket), Done)

    def status(self) -> dict[str, Any]:
        """Return instance, ranks with their versions and weights states, and what the loop does."""
        ranks = self._ask(GetStatus(), WorkerStatus)
        versions = {rank.version for rank in ranks}
        return self.health() | {
            "instance": self.instance,
            "model": self.settings.name,
            "world_size": self.settings.tp,
            "weight_version": versions.pop() if len(versions) == 1 else None,
            "ranks": [msgspec.to_builtins(rank) for rank in ranks],
        }

    def health(self) -> dict[str, Any]:
        """Return what is known without asking the workers."""
        with self._changed:
            return {
                "status": self._state,
                "reason": str(self._error) if self._error else "",
                "paused": self._paused,
                "num_requests": len(self._waiting),
                "mixed_steps": self._mixed_steps,
            }

    def fingerprints(self) -> list[Fingerprints]:
        """Return sha256 sums of every live shard of every rank; the steps wait meanwhile."""
        return self._ask(GetFingerprints(), Fingerprints)

    def stop(self) -> None:
        """Fail what is running, end the workers, join the loop; idempotent."""
        self._give_up("stopped", LocalProtocolError("the engine was stopped"))
        self._fleet.stop()
        if self._loop.is_alive() and threading.current_thread() is not self._loop:
            self._loop.join(10.0)

    def _ask(self, command: Command, kind: type[AnyReply]) -> list[AnyReply]:
        with self._changed:
            self._check_ready()
        return self._fleet.call(command, kind, self.settings.step_s)

    def _run(self) -> None:
        try:
            model = self._fleet.wait_ready()
            with self._changed:
                self._model = model
                self._state = "ready" if self._state == "starting" else self._state
                self._changed.notify_all()
            stop_tokens = frozenset(model.stop_tokens)
            while (batch := self._next_batch()) is not None:
                self._step(*batch, stop_tokens)
        except HeadraceError as error:
            self._give_up("failed", error)

    def _next_batch(self) -> tuple[list[Request], Step] | None:
        """Wait until there is something to do; None when the engine is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._state != "ready" or (self._waiting and not self._paused))
            if self._state != "ready":
                return None
            requests = list(itertools.islice(self._waiting.values(), self.settings.max_running))
            ended, self._ended = self._ended, []
            self._is_stepping = True
            return requests, Step([request.job() for request in requests], ended)

    def _step(self, requests: list[Request], command: Step, stop_tokens: frozenset[int]) -> None:
        """Make a token per request. The step lasts until they are accepted: only then may a pause drop caches."""
        try:
            replies = self._fleet.call(command, Stepped, self.settings.step_s)
            with self._changed:
                self._accept(requests, replies, stop_tokens)
        finally:
            with self._changed:
                self._is_stepping = False
                self._changed.notify_all()

    def _accept(self, requests: list[Request], replies: list[Stepped], stop_tokens: frozenset[int]) -> None:
        difference = version_conflict(replies)
        if difference:
            self._mixed_steps += 1
        for request, token in zip(requests, replies[0].tokens, strict=True):
            if request.number not in self._waiting:
                continue
            if difference:
                self._end(request, Finished("error", IntegrityError(difference, weights_state="mixed")))
            elif reason := request.accept(token, replies[0].begin.version, stop_tokens):
                self._end(request, Finished(reason))

    def _stop_stepping(self, end: float, deadline_s: float) -> None:
        with self._changed:
            self._check_ready()
            was_paused, self._paused = self._paused, True
            if not self._changed.wait_for(lambda: not self._is_stepping, max(0.0, end - time.monotonic())):
                self._paused = was_paused
                self._changed.notify_all()
                raise TransferTimeoutError(
                    f"the running step did not end within {deadline_s:g} s", retryable=True
                )
            self._check_alive()

    def _drop_caches(self, deadline_s: float) -> None:
        with self._changed:
            for request in self._waiting.values():
                request.cached = False
            self._ended.clear()
        self._fleet.call(DropCaches(), Done, deadline_s)

    def _end(self, request: Request, event: Finished) -> None:
        if self._waiting.pop(request.number, None) is not None:
            self._ended.append(request.number)
            request.sink(event)

    def _on_loss(self, error: HeadraceError) -> None:
        self._give_up("failed", error)

    def _give_up(self, state: Literal["failed", "stopped"], error: HeadraceError) -> None:
        with self._changed:
            if self._state not in ("failed", "stopped"):
                self._state, self._error = state, error
            for request in list(self._waiting.values()):
                self._end(request, Finished("error", self._error))
            self._changed.notify_all()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise self._error

    def _check_ready(self) -> Ready:
        self._check_alive()
        if self._model is None:
            raise LocalProtocolError("the engine is still loading; wait until it is ready", retryable=True)
        return self._model


def _check_prompt(prompt: list[int], sampling: Sampling, model: Ready) -> None:
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one token", name="prompt")
    foreign = [token for token in prompt if not 0 <= token < model.vocab_size]
    if foreign:
        raise ConfigError(f"token {foreign[0]} is not in the vocabulary of {model.vocab_size}", name="prompt")
    if sampling.max_tokens < 1 or sampling.temperature < 0:
        raise ConfigError("max_tokens must be at least 1 and temperature at least 0", name="max_tokens")
    if len(prompt) + sampling.max_tokens > model.max_positions:
        message = (
            f"{len(prompt)} prompt tokens and max_tokens {sampling.max_tokens} exceed the model's "
            f"{model.max_positions} positions"
        )
        raise ConfigError(message, name="max_tokens")


def _check_one_version(ranks: list[WorkerStatus]) -> None:
    """Refuse to serve weights that are missing, mixed, changing or of several versions."""
    if all(rank.version is None for rank in ranks):
        raise LocalProtocolError(
            "the engine was started with dummy weights; it stays paused until its first update"
        )
    unsettled = any(rank.weights_state != "old" or rank.epoch % 2 for rank in ranks)
    if unsettled or len({rank.version for rank in ranks}) > 1:
        told = ", ".join(f"rank {r.rank}: {r.weights_state}, version {r.version}" for r in ranks)
        message = f"the weights are not of one confirmed version ({told}); an update must finish first"
        raise LocalProtocolError(message, weights_state="mixed", retryable=True)
