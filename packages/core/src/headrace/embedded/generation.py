"""One generation request: what was asked, what was made, and with which weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from headrace.embedded.messages import Job, Stepped
from headrace.errors import HeadraceError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: Most tokens to make.
        temperature: 0 is greedy.
        seed: Equal seeds draw equal tokens.
        ignore_stop: Go on after the model's end token.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    seed: int = 0
    ignore_stop: bool = False


@dataclass(frozen=True, slots=True)
class TokenMade:
    """One new token and the version of the weights that made it."""

    token: int
    weight_version: int | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request; `error` is set where `reason` is `error`."""

    reason: FinishReason
    error: HeadraceError | None = None


Event = TokenMade | Finished
Sink = Callable[[Event], None]


@dataclass(eq=False)
class Request:
    """A request inside the engine; changed only by the engine's loop, under its lock.

    Attributes:
        number: Unique in the engine.
        prompt: Prompt tokens.
        sampling: How tokens are chosen.
        sink: Receives every event, from the engine's thread; must not block.
        tokens: Generated so far.
        versions: Version of the weights behind each generated token.
        cached: Whether the workers hold a KV cache of all but the last token.
    """

    number: int
    prompt: list[int]
    sampling: Sampling
    sink: Sink
    tokens: list[int] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    cached: bool = False

    def job(self) -> Job:
        """Return this request's part of the next step."""
        whole = self.prompt + self.tokens
        feed = whole[-1:] if self.cached else whole
        sampling = self.sampling
        return Job(self.number, feed, not self.cached, sampling.temperature, sampling.seed, len(whole))

    def accept(self, token: int, version: int | None, stop_tokens: frozenset[int]) -> FinishReason | None:
        """Take a new token; return why the request ends with it, if it does."""
        self.cached = True
        self.tokens.append(token)
        self.versions.append(version)
        self.sink(TokenMade(token, version))
        if token in stop_tokens and not self.sampling.ignore_stop:
            return "stop"
        return "length" if len(self.tokens) >= self.sampling.max_tokens else None


def version_spans(versions: list[int | None]) -> list[tuple[int | None, int, int]]:
    """Return runs of equal versions as `(version, begin, end)`, half-open token indices."""
    spans: list[tuple[int | None, int, int]] = []
    for index, version in enumerate(versions):
        if spans and spans[-1][0] == version:
            spans[-1] = (version, spans[-1][1], index + 1)
        else:
            spans.append((version, index, index + 1))
    return spans


def version_conflict(replies: Sequence[Stepped]) -> str:
    """Return how a step saw more than one version of the weights; empty if it did not."""
    versions = {moment.version for r in replies for moment in (r.begin, r.end)}
    moved = any(r.begin.epoch != r.end.epoch or not r.begin.settled for r in replies)
    if len(versions) == 1 and not moved:
        return ""
    told = "; ".join(
        f"rank {rank}: version {r.begin.version} to {r.end.version}, epoch {r.begin.epoch} to {r.end.epoch}"
        for rank, r in enumerate(replies)
    )
    return f"a step saw weights that changed under it ({told}); pause the engine before a commit"
