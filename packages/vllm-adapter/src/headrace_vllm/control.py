"""VllmControl: the EngineControl of a vLLM server, over its development routes. Needs no vLLM."""

from __future__ import annotations

from dataclasses import asdict
from http import HTTPStatus
from typing import TYPE_CHECKING

from headrace.adapter.calls import version_number
from headrace.engine_http import HttpEngine, decoded
from headrace.errors import (
    BackendUnavailableError,
    ConfigError,
    HeadraceError,
    LocalProtocolError,
    RemoteProtocolError,
)
from headrace_vllm.calls import EXTENSION, HOLD, OBSTACLE, TRANSFER, obstacle_of

if TYPE_CHECKING:
    import httpx

    from headrace.protocols import Ticket
    from headrace.types import CacheMode

_START = (
    'start vLLM with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend":"headrace"}\' '
    "(or --worker-extension-cls headrace_vllm.WorkerExtension), with headrace-vllm installed beside it"
)


class VllmControl(HttpEngine):
    """EngineControl over a vLLM server's HTTP interface.

    The routes exist only with `VLLM_SERVER_DEV_MODE=1`, and vLLM's `--api-key` does not guard them: keep them in a
    network of their own, or behind a proxy whose key and certificate `headers` and `verify` carry.

    Deadlines are HTTP's. vLLM gets no time-outs: one that passed there would leave answers of workers for later calls,
    also forward steps, to find.
    """

    def expected_receivers(self, deadline_s: float) -> int:
        """Return the number of workers over all data-parallel replicas behind this address."""
        response = self._send("GET", "/get_world_size", deadline_s)
        if response.status_code == HTTPStatus.NOT_FOUND:
            message = (
                f"{self._url} has no /get_world_size: it is no vLLM, or not one that takes updates; {_START}"
            )
            raise BackendUnavailableError(message, name=self._url)
        count = self._answer("/get_world_size", response).get("world_size")
        if not isinstance(count, int) or count < 1:
            raise RemoteProtocolError(f"{self._url}/get_world_size names no world_size; is it a vLLM server?")
        return count

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:
        """Hand the ticket to every worker, by vLLM's weight-transfer route or by the worker extension."""
        fields = asdict(ticket)
        # After an error inside a route the server drops the connection, maybe while the next request is on its way.
        once = {"connection": "close"}
        first = self._send("POST", f"/{TRANSFER}", deadline_s, json={"init_info": fields}, headers=once)
        if first.is_success:
            return
        call = {"method": EXTENSION, "kwargs": fields}
        second = self._send("POST", "/collective_rpc", deadline_s, json=call, headers=once)
        if not second.is_success:
            said = [f"/{TRANSFER}: {_brief(first)}", f"/collective_rpc: {_brief(second)}"]
            message = f"{self._url} does not take tickets ({'; '.join(said)}); {_START}"
            raise BackendUnavailableError(message, name=self._url)

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        """Freeze requests; with `recompute` their KV and all prefix caches are dropped."""
        clear = "true" if cache == "recompute" else "false"
        self._request("POST", "/pause", deadline_s, params={"mode": "keep", "clear_cache": clear})

    def hold_obstacle(self, deadline_s: float) -> str | None:
        """Return why this server's workers cannot be held, as its engine core says."""
        response = self._send("POST", "/collective_rpc", deadline_s, json={"method": OBSTACLE})
        if not response.is_success:
            return f"it does not take calls to its workers (/collective_rpc: {_brief(response)})"
        return obstacle_of((decoded(response) or {}).get("results"), self.expected_receivers(deadline_s))

    def hold(self, update_id: str, deadline_s: float) -> None:
        """Have every worker stand still, between the same two forward steps, until its receiver lets go."""
        call = {"method": HOLD, "kwargs": {"update_id": update_id, "deadline_s": deadline_s}}
        self._request("POST", "/collective_rpc", deadline_s, json=call)

    def confirm(self, version: int, deadline_s: float) -> None:
        """Have vLLM report the version: `/weight_info`, and the spans of every token from now on."""
        response = self._send(
            "POST", "/update_weight_version", deadline_s, json={"new_version": str(version)}
        )
        if response.status_code == HTTPStatus.NOT_FOUND:
            return
        self._answer("/update_weight_version", response)

    def resume(self, deadline_s: float) -> None:
        """Let forward steps go on."""
        self._request("POST", "/resume", deadline_s)

    def served_version(self, deadline_s: float) -> int | None:
        """Return the version that vLLM reports, or None where no update was made."""
        response = self._send("GET", "/weight_info", deadline_s)
        if response.status_code == HTTPStatus.NOT_FOUND:
            return None
        return version_number(self._answer("/weight_info", response).get("weight_version"))

    def _answer(self, path: str, response: httpx.Response) -> dict[str, object]:
        if not response.is_success:
            raise self._refusal(path, response)
        return decoded(response) or {}

    def _refusal(self, path: str, response: httpx.Response) -> HeadraceError:
        message = f"{self._url}{path} answered {_brief(response)}"
        if response.status_code == HTTPStatus.NOT_FOUND:
            return BackendUnavailableError(f"{message}; {_START}", name=self._url)
        if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return ConfigError(f"{message}; give the key with --header", name=self._url)
        if response.status_code == HTTPStatus.BAD_REQUEST:
            return LocalProtocolError(message, name=self._url)
        return RemoteProtocolError(message, name=self._url)


def _brief(response: httpx.Response) -> str:
    body = decoded(response) or {}
    error = body.get("error", body.get("detail", ""))
    text = error.get("message", "") if isinstance(error, dict) else str(error)
    return f"HTTP {response.status_code} {text or response.text.strip()}"[:300]
