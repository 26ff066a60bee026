"""The front's door: a route of SGLang's server, and the same for an `Engine`, that hands a ticket to every scheduler.

SGLang's own routes for weights wait until no request runs, and refuse data-parallel servers. A ticket changes nothing,
so it goes past their locks: straight to all schedulers, between two of their steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.adapter.calls import version_number
from headrace.errors import BackendUnavailableError, ConfigError, HeadraceError
from headrace.protocols import Ticket

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

ROUTE = "/headrace"


def open_door(result: Any, *_args: object, **_options: object) -> None:  # noqa: ANN401
    """Add the route, where this process serves HTTP: a hook after the front has started its processes."""
    manager = result[0]
    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    if server is None or manager is None:
        return
    from sglang.srt.utils.auth import AuthLevel, auth_level  # noqa: PLC0415

    async def headrace(request: Request) -> Response:
        return await _answer(manager, request)

    server.app.router.add_route(
        ROUTE, auth_level(AuthLevel.ADMIN_OPTIONAL)(headrace), methods=["GET", "POST"]
    )


def about(manager: Any) -> dict[str, Any]:  # noqa: ANN401 - a TokenizerManager
    """Return what an updater must know of this engine: how many receivers, which version, whether KV is stored outside.

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
        "stored": manager.config_value("hicache_storage_backend") is not None,
    }


async def hand_out(manager: Any, ticket: Ticket) -> None:  # noqa: ANN401 - a TokenizerManager
    """Give a ticket to all schedulers; returns when each of them has it.

    Raises:
        BackendUnavailableError: A scheduler cannot take it; says which and why. None of them has taken it then.
    """
    from sglang.srt.managers.io_struct import UpdateWeightsFromIPCReqInput  # noqa: PLC0415

    about(manager)
    manager.auto_create_handle_loop()
    call = UpdateWeightsFromIPCReqInput(zmq_handles={"headrace": "ticket", **asdict(ticket)}, flush_cache=False)
    results = await manager.update_weights_from_ipc_communicator(call)
    problems = [result.message for result in results if not result.success]
    if problems:
        raise BackendUnavailableError("; ".join(problems), name="sglang")


def ticket_of(handles: Mapping[str, str]) -> Ticket | None:
    """Return the ticket in a scheduler's request, or None where it is one of SGLang's own kind."""
    names = ("update_id", "endpoint", "server_key", "token")
    if handles.get("headrace") != "ticket" or not all(name in handles for name in names):
        return None
    return Ticket(*(handles[name] for name in names))


async def _answer(manager: Any, request: Request) -> Response:  # noqa: ANN401
    from starlette.responses import JSONResponse  # noqa: PLC0415

    try:
        if request.method == "GET":
            return JSONResponse(about(manager))
        ticket = msgspec.json.decode(await request.body(), type=Ticket)
        await hand_out(manager, ticket)
    except msgspec.MsgspecError as error:
        return _refused(ConfigError(f"that is no ticket: {error}"), 400)
    except HeadraceError as error:
        return _refused(error, 503)
    return JSONResponse({"enrolled": ticket.update_id})


def _refused(error: HeadraceError, status: int) -> Response:
    from starlette.responses import JSONResponse  # noqa: PLC0415

    body = {"type": type(error).__name__, "message": str(error), "weights_state": error.weights_state}
    return JSONResponse({"error": body}, status)
