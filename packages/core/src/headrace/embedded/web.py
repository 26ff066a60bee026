"""The engine's HTTP interface: completions in OpenAI's form, pause and resume, and what the updater asks."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

import anyio.to_thread
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from headrace.embedded.generation import Event, Request, Sampling, TokenMade, version_spans
from headrace.embedded.text import LazyTokenizer, TextStream
from headrace.errors import (
    ConfigError,
    HeadraceError,
    LocalProtocolError,
    PeerLostError,
    RemoteFailure,
    TransferTimeoutError,
)
from headrace.protocols import Ticket
from headrace.types import CacheMode

if TYPE_CHECKING:
    from headrace.embedded.engine import EmbeddedEngine

_STATUS: tuple[tuple[type[HeadraceError], int], ...] = (
    (ConfigError, 400),
    (LocalProtocolError, 409),
    (PeerLostError, 503),
    (TransferTimeoutError, 504),
)
_MAX_PAUSE_S = 600.0
_FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "top_p": (1, None),
    "logprobs": (None, 0),
    "echo": (False,),
    "stop": (None, []),
}


class _Body(msgspec.Struct, kw_only=True):
    """The fields of a completion request that the engine knows."""

    prompt: str | list[int]
    model: str = ""
    max_tokens: int = 16
    temperature: float = 1.0
    seed: int | None = None
    stream: bool = False
    ignore_eos: bool = False


def make_app(engine: EmbeddedEngine, tokenizer: LazyTokenizer) -> Starlette:
    """Return the ASGI application over a started engine."""
    service = _Service(engine, tokenizer)
    routes = [
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/pause", service.pause, methods=["POST"]),
        Route("/resume", service.resume, methods=["POST"]),
        Route("/headrace/enrol", service.enrol, methods=["POST"]),
        Route("/headrace/status", service.status),
        Route("/headrace/fingerprints", service.fingerprints),
    ]
    guarded = [
        Route(r.path, _guarded(r.endpoint, engine.settings.api_key), methods=list(r.methods or ()))
        for r in routes
    ]
    return Starlette(routes=guarded)


def _guarded(
    endpoint: Callable[[HttpRequest], Awaitable[Response]], api_key: str
) -> Callable[[HttpRequest], Awaitable[Response]]:
    """Check the key, and turn Headrace's errors into HTTP answers that the caller can rebuild them from."""

    async def answer(request: HttpRequest) -> Response:
        given = request.headers.get("authorization", "")
        if api_key and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            return JSONResponse(
                {"error": {"type": "ConfigError", "message": "the API key is missing or wrong"}}, 401
            )
        try:
            return await endpoint(request)
        except HeadraceError as error:
            return JSONResponse({"error": _error_body(error)}, status_code=_status_of(error))

    return answer


def _status_of(error: HeadraceError) -> int:
    return next((code for kind, code in _STATUS if isinstance(error, kind)), 500)


def _error_body(error: HeadraceError) -> dict[str, Any]:
    failure = RemoteFailure.of(error, weights_state=error.weights_state)
    return {"type": failure.type_name, "message": failure.message, "weights_state": failure.weights_state}


@dataclass
class _Service:
    """The endpoints; everything that may block runs in a thread."""

    engine: EmbeddedEngine
    tokenizer: LazyTokenizer

    async def health(self, request: HttpRequest) -> Response:  # noqa: ARG002
        state = self.engine.health()
        return JSONResponse(state, status_code=200 if state["status"] == "ready" else 503)

    async def models(self, request: HttpRequest) -> Response:  # noqa: ARG002
        card = {"id": self.engine.settings.name, "object": "model", "created": 0, "owned_by": "headrace"}
        return JSONResponse({"object": "list", "data": [card]})

    async def pause(self, request: HttpRequest) -> Response:
        cache = request.query_params.get("cache", "recompute")
        if cache not in get_args(CacheMode):
            raise ConfigError(
                f"cache is {cache!r}; choose one of {', '.join(get_args(CacheMode))}", name="cache"
            )
        deadline_s = _seconds(request.query_params.get("timeout_s", "60"))
        await anyio.to_thread.run_sync(self.engine.pause, cast("CacheMode", cache), deadline_s)
        return JSONResponse(self.engine.health())

    async def resume(self, request: HttpRequest) -> Response:  # noqa: ARG002
        await anyio.to_thread.run_sync(self.engine.resume)
        return JSONResponse(self.engine.health())

    async def enrol(self, request: HttpRequest) -> Response:
        try:
            ticket = msgspec.json.decode(await request.body(), type=Ticket)
        except msgspec.DecodeError as error:
            raise ConfigError(f"the body is not a ticket: {error}", name="ticket") from None
        await anyio.to_thread.run_sync(self.engine.enrol, ticket)
        return JSONResponse({"num_receivers": self.engine.settings.tp})

    async def status(self, request: HttpRequest) -> Response:  # noqa: ARG002
        return JSONResponse(await anyio.to_thread.run_sync(self.engine.status))

    async def fingerprints(self, request: HttpRequest) -> Response:  # noqa: ARG002
        ranks = await anyio.to_thread.run_sync(self.engine.fingerprints)
        return JSONResponse({"ranks": msgspec.to_builtins(ranks)})

    async def completions(self, request: HttpRequest) -> Response:
        body = _parse(await request.body(), self.engine.settings.name)
        tokenizer = await anyio.to_thread.run_sync(self.tokenizer.get)
        prompt = tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        completion = _Completion(self.engine, prompt, _sampling(body), TextStream(tokenizer))
        if body.stream:
            return StreamingResponse(completion.chunks(), media_type="text/event-stream")
        return JSONResponse(await completion.whole())


class _Completion:
    """One request between the engine's thread and the event loop."""

    def __init__(
        self, engine: EmbeddedEngine, prompt: list[int], sampling: Sampling, text: TextStream
    ) -> None:
        self._engine = engine
        self._text = text
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._request: Request = engine.submit(prompt, sampling, self._sink)
        self._common = {
            "id": f"cmpl-{self._request.number}",
            "created": int(time.time()),
            "model": engine.settings.name,
        }

    async def chunks(self) -> AsyncIterator[str]:
        """Yield server-sent events: one per token, then the reason of the end, then `[DONE]`."""
        try:
            while isinstance(event := await self._events.get(), TokenMade):
                yield self._chunk(self._text.push(event.token), [event.token], event.weight_version, None)
            if event.error is not None:
                yield _sse({"error": _error_body(event.error)})
                return
            yield self._chunk(self._text.flush(), [], self._last_version(), event.reason)
            yield "data: [DONE]\n\n"
        finally:
            self._engine.cancel(self._request)

    async def whole(self) -> dict[str, Any]:
        """Return the finished answer.

        Raises:
            HeadraceError: The request failed.
        """
        try:
            text = []
            while isinstance(event := await self._events.get(), TokenMade):
                text.append(self._text.push(event.token))
        finally:
            self._engine.cancel(self._request)
        if event.error is not None:
            raise event.error
        request, prompt_tokens = self._request, len(self._request.prompt)
        choice = {
            "index": 0,
            "text": "".join(text) + self._text.flush(),
            "token_ids": request.tokens,
            "finish_reason": event.reason,
            "weight_version": self._last_version(),
            "weight_versions": version_spans(request.versions),
        }
        num_tokens = len(request.tokens)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": prompt_tokens + num_tokens,
        }
        return self._common | {"object": "text_completion", "choices": [choice], "usage": usage}

    def _chunk(self, text: str, tokens: list[int], version: int | None, reason: str | None) -> str:
        choice = {
            "index": 0,
            "text": text,
            "token_ids": tokens,
            "weight_version": version,
            "finish_reason": reason,
        }
        return _sse(self._common | {"object": "text_completion", "choices": [choice]})

    def _last_version(self) -> int | None:
        return self._request.versions[-1] if self._request.versions else None

    def _sink(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


def _sse(message: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(message)}\n\n"


def _parse(raw: bytes, name: str) -> _Body:
    """Read a completion request; refuse what would change the answer and is not supported."""
    try:
        body = msgspec.json.decode(raw, type=_Body)
        given = msgspec.json.decode(raw, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"the body is not a completion request: {error}", name="body") from None
    for field, allowed in _FIXED.items():
        if field in given and given[field] not in allowed:
            raise ConfigError(f"{field}={given[field]!r} is not supported by the embedded engine", name=field)
    if body.model not in ("", name):
        raise ConfigError(
            f"model {body.model!r} is not served here; this engine serves {name!r}", name="model"
        )
    return body


def _sampling(body: _Body) -> Sampling:
    seed = time.time_ns() if body.seed is None else body.seed
    return Sampling(
        max_tokens=body.max_tokens, temperature=body.temperature, seed=seed, ignore_stop=body.ignore_eos
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= _MAX_PAUSE_S:
        raise ConfigError(f"timeout_s is {text!r}; give seconds up to {_MAX_PAUSE_S:g}", name="timeout_s")
    return value
