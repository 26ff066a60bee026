"""The demo's load: several streams that each ask for one completion after the other, and note every token."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from headrace.errors import TransferTimeoutError

MIN_TOKENS, MAX_TOKENS = 64, 128
_ANSWER_S = 60.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request begins with: the text, and its tokens, which are what is sent."""

    text: str
    tokens: list[int]


@dataclass(eq=False)
class StreamedRequest:
    """One request as its client saw it; written by its stream's thread only.

    Attributes:
        stream: Which stream sent it.
        prompt: Its beginning.
        num_wanted: Tokens that were asked for.
        tokens: Tokens that came, in order.
        texts: Text that came with each token.
        versions: Version of the weights that made each token.
        times_s: When each token came, on the host's monotonic clock.
        finish_reason: Why it ended; None while it runs.
        error: What went wrong, if anything did.
        done: Whether the stream was ended properly.
    """

    stream: int
    prompt: Prompt
    num_wanted: int
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""
    done: bool = False

    @property
    def version_starts(self) -> list[int]:
        """Indices of the tokens whose version differs from that of the token before."""
        return [i for i in range(1, len(self.versions)) if self.versions[i] != self.versions[i - 1]]

    def take(self, choice: dict[str, Any], now_s: float) -> None:
        """Note one event of the stream; text without a token belongs to the last one."""
        for token in choice["token_ids"]:
            self.tokens.append(token)
            self.versions.append(choice["weight_version"])
            self.times_s.append(now_s)
            self.texts.append("")
        if self.texts:
            self.texts[-1] += choice["text"]
        self.finish_reason = choice["finish_reason"] or self.finish_reason


class Streams:
    """Keeps `len(streams)` requests running: whenever one ends, its stream sends the next.

    Args:
        url: The engine.
        prompts: What requests begin with, drawn by `seed`.
        num_streams: Requests that run at once.
        seed: Source of the choices.
    """

    def __init__(self, url: str, prompts: Sequence[Prompt], num_streams: int, seed: int) -> None:
        self._url = url
        self._prompts = prompts
        self._over = threading.Event()
        self._broken = threading.Event()
        self._lock = threading.Lock()
        self._requests: list[StreamedRequest] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number, random), name=f"stream-{number}", daemon=True)
            for number, random in enumerate(_randoms(seed, num_streams))
        ]

    @property
    def requests(self) -> list[StreamedRequest]:
        """All requests so far, in the order they were sent."""
        with self._lock:
            return list(self._requests)

    @property
    def num_tokens(self) -> int:
        """Tokens that have come so far."""
        return sum(len(request.tokens) for request in self.requests)

    def start(self) -> None:
        """Send the first requests."""
        for thread in self._threads:
            thread.start()

    def wait_tokens(self, count: int, deadline_s: float) -> None:
        """Wait until every stream has received `count` more tokens.

        Raises:
            TransferTimeoutError: They did not come within the deadline, or a request failed.
        """
        wanted = {stream: have + count for stream, have in self._per_stream().items()}
        end = time.monotonic() + deadline_s
        while any(self._per_stream()[stream] < least for stream, least in wanted.items()):
            if self._broken.is_set() or time.monotonic() > end:
                why = next((r.error for r in self.requests if r.error), f"none for {deadline_s:g} s")
                raise TransferTimeoutError(f"the demo's requests get no tokens: {why}", name=self._url)
            time.sleep(_POLL_S)

    def finish(self, deadline_s: float) -> None:
        """Send no more requests and wait until those that run have ended; idempotent."""
        self._over.set()
        end = time.monotonic() + deadline_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))

    def cancel(self) -> None:
        """Leave requests where they are; the threads end at their next token."""
        self._broken.set()
        self._over.set()

    def _per_stream(self) -> dict[int, int]:
        counts = dict.fromkeys(range(len(self._threads)), 0)
        for request in self.requests:
            counts[request.stream] += len(request.tokens)
        return counts

    def _run(self, number: int, random: Random) -> None:
        with httpx.Client(base_url=self._url, trust_env=False, timeout=_ANSWER_S) as client:
            while not self._over.is_set():
                prompt, num_wanted = random.choice(self._prompts), random.randint(MIN_TOKENS, MAX_TOKENS)
                request = StreamedRequest(number, prompt, num_wanted)
                with self._lock:
                    self._requests.append(request)
                self._ask(client, request)

    def _ask(self, client: httpx.Client, request: StreamedRequest) -> None:
        body = {
            "prompt": request.prompt.tokens,
            "max_tokens": request.num_wanted,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                self._read(request, response.iter_lines())
        except (httpx.HTTPError, KeyError, ValueError) as error:
            request.error = f"{type(error).__name__}: {error}"
        if request.error:
            self._broken.set()
            self._over.set()

    def _read(self, request: StreamedRequest, lines: Iterable[str]) -> None:
        for line in lines:
            if self._broken.is_set():
                return
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                request.done = True
                return
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                request.error = str(event["error"].get("message", event["error"]))
                return
            request.take(event["choices"][0], time.monotonic())


def _randoms(seed: int, count: int) -> list[Random]:
    return [Random(f"{seed}/{number}") for number in range(count)]  # noqa: S311 - a load, not a secret


@dataclass(frozen=True, slots=True)
class Gap:
    """The time between two tokens of one request."""

    begin_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """Seconds without a token."""
        return self.end_s - self.begin_s

    def overlaps(self, begin_s: float, end_s: float) -> bool:
        """Return whether a part of the gap lies in `[begin_s, end_s)`."""
        return self.begin_s < end_s and self.end_s > begin_s


def gaps(requests: Iterable[StreamedRequest]) -> Iterator[Gap]:
    """Yield the gap before every token but the first of each request."""
    for request in requests:
        for before, after in zip(request.times_s, request.times_s[1:], strict=False):
            yield Gap(before, after)
