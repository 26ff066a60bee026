"""A fence before an engine: a proxy that asks for TLS, a client's certificate and a key, as operators put there."""

from __future__ import annotations

import ssl
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import trustme
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace.testing.engine_process import free_port

KEY = "Bearer of the fence"
START_S = 20.0


class Fence:
    """Forwards requests that carry `KEY` over TLS with a certificate that it knows. Use as a context.

    Attributes:
        url: Where it listens.
        ca: Authority of its own certificate, PEM.
        certificate: A client's certificate and key that it accepts, PEM.
    """

    def __init__(self, upstream: str, folder: Path) -> None:
        authority = trustme.CA()
        own, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("updater@example.org")
        self.ca, self.certificate, mine = folder / "ca.pem", folder / "client.pem", folder / "fence.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        client.private_key_and_cert_chain_pem.write_to_path(str(self.certificate))
        own.private_key_and_cert_chain_pem.write_to_path(str(mine))
        port = free_port()
        self.url = f"https://127.0.0.1:{port}"
        self._upstream = upstream
        methods = ["GET", "POST"]
        app = Starlette(routes=[Route("/{path:path}", self._forward, methods=methods)])
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, port=port, log_level="error", lifespan="off", ssl_certfile=mine, ssl_ca_certs=str(self.ca),
                ssl_cert_reqs=ssl.CERT_REQUIRED,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    async def _forward(self, request: Request) -> Response:
        if request.headers.get("authorization") != KEY:
            return Response("who are you?", status_code=401)
        async with httpx.AsyncClient(base_url=self._upstream, timeout=60, trust_env=False) as client:
            answer = await client.request(
                request.method, request.url.path, params=request.query_params, content=await request.body(),
                headers={"content-type": request.headers.get("content-type", "application/json")},
            )  # fmt: skip
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    def __enter__(self) -> Self:
        self._thread.start()
        limit = time.monotonic() + START_S
        while not self._server.started:
            if time.monotonic() > limit or not self._thread.is_alive():
                raise RuntimeError("the fence did not start")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(START_S)
