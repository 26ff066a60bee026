"""The front's door: routes of SGLang's server, and the same for an `Engine`, for tickets and for a pause.

SGLang's own routes for weights wait until no request runs, and refuse data-parallel servers. A ticket changes nothing,
so it goes past their locks: straight to all schedulers, between two of their steps. SGLang's route for a pause answers
before its schedulers do, and the one for a flush says what the first replica said.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.adapter.calls import version_number
from headrace.errors import BackendUnavailableError, ConfigError, HeadraceError
from headrace.protocols import Ticket
from headrace.types import CacheMode
from headrace_sglang.routes import PAUSE_ROUTE, ROUTE

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


def open_door(result: Any, *_args: object, **_options: object) -> None:  # noqa: ANN401
    """Add the routes, where this process serves HTTP: a hook after the front has started its processes."""
    manager = result[0]
    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    if server is None or manager is None:
        return
    from sglang.srt.utils.auth import AuthLevel, auth_level  # noqa: PLC0415

    async def headrace(request: Request) -> Response:
        return await _answer(_enrolled(manager, request))

    async def paused(request: Request) -> Response:
        return await _answer(_paused(manager, request))

    guarded = auth_level(AuthLevel.ADMIN_OPTIONAL)
    server.app.router.add_route(ROUTE, guarded(headrace), methods=["GET", "POST"])
    server.app.router.add_route(PAUSE_ROUTE, guarded(paused), methods=["POST"])


def about(manager: Any) -> dict[str, Any]:  # noqa: ANN401 - a TokenizerManager
    """Return what an updater must know of this engine: how many receivers, which version.

    Raises:
        BackendUnavailableError: This SGLang cannot be updated; says why.
    """
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415

    from headrace_sglang.plugin import why_not  # noqa: PLC0415 - it imports this module

    fault = why_not()
    if fault:
        raise BackendUnavailableError(fault, name="sglang")
    parallel = get_parallel()
    replicas = 1 if parallel.attn_dp_enabled else parallel.num_dp_ranks
    return {
        "receivers": replicas * parallel.tp_size * parallel.pp_size,
        "version": version_number(manager.config_value("weight_version")),
    }


async def hand_out(manager: Any, ticket: Ticket) -> None:  # noqa: ANN401 - a TokenizerManager
    """Give a ticket to all schedulers; returns when each of them has it.

    Raises:
        BackendUnavailableError: A scheduler cannot take it; says which and why. Ranks of its tensor-parallel group
            have not taken it then; those of other replicas may have.
    """
    from sglang.srt.managers.io_struct import UpdateWeightsFromIPCReqInput  # noqa: PLC0415

    about(manager)
    call = UpdateWeightsFromIPCReqInput(zmq_handles={"headrace": "ticket", **asdict(ticket)}, flush_cache=False)
    results = await _ask_all(manager, "update_weights_from_ipc", call)
    problems = [result.message for result in results if not result.success]
    if problems:
        raise BackendUnavailableError("; ".join(problems), name="sglang")


async def pause(manager: Any, cache: CacheMode) -> str:  # noqa: ANN401 - a TokenizerManager
    """Stop forward steps of all schedulers; returns when each of them has answered, paused.

    With `recompute` requests give up their KV, and all of it is dropped, with what HiCache has stored.

    Returns:
        Why KV was not dropped everywhere, so that old weights' KV may be left; nothing where it was, or is kept.

    Raises:
        BackendUnavailableError: HiCache's storage was not cleared.
    """
    from sglang.srt.managers import io_struct  # noqa: PLC0415

    mode = "retract" if cache == "recompute" else "in_place"
    await manager.pause_generation(io_struct.PauseGenerationReqInput(mode=mode))
    if cache == "keep":
        # Sets nothing: of what every scheduler answers in its turn, the cheapest.
        await _ask_all(manager, "set_internal_state", io_struct.SetInternalStateReq(server_args={}))
        return ""
    refusal = _refusal(await _ask_all(manager, "flush_cache", io_struct.FlushCacheReqInput()))
    if refusal:
        return refusal
    if manager.mm_processor is not None:
        manager.mm_processor.clear_preprocess_cache()
    if manager.config_value("hicache_storage_backend") is not None:
        refusal = _refusal(await _ask_all(manager, "clear_hicache_storage", io_struct.ClearHiCacheReqInput()))
        if refusal:
            raise BackendUnavailableError(f"HiCache's storage was not cleared: {refusal}", name="sglang")
    return ""


def ticket_of(handles: Mapping[str, str]) -> Ticket | None:
    """Return the ticket in a scheduler's request, or None where it is one of SGLang's own kind."""
    names = ("update_id", "endpoint", "server_key", "token")
    if handles.get("headrace") != "ticket" or not all(name in handles for name in names):
        return None
    return Ticket(*(handles[name] for name in names))


async def _ask_all(manager: Any, name: str, request: Any) -> Sequence[Any]:  # noqa: ANN401
    """Return the answers of all replicas to one of SGLang's control requests; SGLang's own methods look at the first.

    It goes on where its caller is cancelled: answers that come late would be taken for those to the next request.
    """
    manager.auto_create_handle_loop()
    answers: Sequence[Any] = await asyncio.shield(getattr(manager, f"{name}_communicator")(request))
    return answers


def _refusal(answers: Sequence[Any]) -> str:
    refused = [getattr(answer, "message", "") for answer in answers if not answer.success]
    if not refused:
        return ""
    return "; ".join([f"{len(refused)} of {len(answers)} schedulers refused", *filter(None, dict.fromkeys(refused))])


async def _enrolled(manager: Any, request: Request) -> dict[str, Any]:  # noqa: ANN401
    if request.method == "GET":
        return about(manager)
    ticket = msgspec.json.decode(await request.body(), type=Ticket)
    await hand_out(manager, ticket)
    return {"enrolled": ticket.update_id}


async def _paused(manager: Any, request: Request) -> dict[str, Any]:  # noqa: ANN401
    cache: CacheMode = msgspec.json.decode(await request.body(), type=CacheMode)
    return {"refused": await pause(manager, cache)}


async def _answer(told: Awaitable[dict[str, Any]]) -> Response:
    from starlette.responses import JSONResponse  # noqa: PLC0415

    try:
        return JSONResponse(await told)
    except msgspec.MsgspecError as error:
        return _refused(ConfigError(f"that is no request of Headrace: {error}"), 400)
    except HeadraceError as error:
        return _refused(error, 503)


def _refused(error: HeadraceError, status: int) -> Response:
    from starlette.responses import JSONResponse  # noqa: PLC0415

    body = {"type": type(error).__name__, "message": str(error), "weights_state": error.weights_state}
    return JSONResponse({"error": body}, status)
