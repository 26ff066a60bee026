"""SglangControl: the EngineControl of an SGLang server. Needs no SGLang."""

from __future__ import annotations

from dataclasses import asdict
from http import HTTPStatus
from typing import TYPE_CHECKING, ClassVar

from headrace.engine_http import HttpEngine
from headrace.errors import BackendUnavailableError, ConfigError, HeadraceError, RemoteProtocolError
from headrace_sglang.pausing import pause_within
from headrace_sglang.routes import PAUSE_ROUTE, ROUTE

if TYPE_CHECKING:
    import httpx

    from headrace.protocols import Ticket
    from headrace.types import CacheMode

_START = (
    "install headrace-sglang in the environment that SGLang runs in and start it again, with `headrace` in "
    "SGLANG_PLUGINS if that is set and without --tokenizer-worker-num"
)


class SglangControl(HttpEngine):
    """EngineControl over an SGLang server's HTTP interface: its own routes, and the plug-in's for tickets and a pause.

    All are guarded as SGLang guards its own routes for weights: by `--admin-api-key`, else by `--api-key`, else not.
    """

    health: ClassVar[str] = ROUTE

    def expected_receivers(self, deadline_s: float) -> int:
        """Return the number of schedulers over all data-parallel replicas behind this address."""
        count = self._request("GET", ROUTE, deadline_s).get("receivers")
        if not isinstance(count, int) or count < 1:
            raise RemoteProtocolError(f"{self._url}{ROUTE} names no receivers; is it an SGLang server?")
        return count

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:
        """Hand the ticket to every scheduler."""
        self._request("POST", ROUTE, deadline_s, json=asdict(ticket))

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        """Stop forward steps; with `recompute` requests give up their KV, and all of it is dropped."""
        pause_within(self, self._pause_once, cache, deadline_s)

    def confirm(self, version: int, deadline_s: float) -> None:
        """Have SGLang report the version: `/model_info`, and the spans of every token from now on."""
        told = {"new_version": str(version), "abort_all_requests": False}
        self._request("POST", "/update_weight_version", deadline_s, json=told)

    def resume(self, deadline_s: float) -> None:
        """Let forward steps go on."""
        self._request("POST", "/continue_generation", deadline_s, json={"torch_empty_cache": False})

    def served_version(self, deadline_s: float) -> int | None:
        """Return the version that SGLang reports, or None where no update was made."""
        version = self._request("GET", ROUTE, deadline_s).get("version")
        return version if isinstance(version, int) else None

    def _pause_once(self, cache: CacheMode, deadline_s: float) -> str:
        return str(self._request("POST", PAUSE_ROUTE, deadline_s, json=cache).get("refused", ""))

    def _health(self, timeout_s: float) -> tuple[bool, str]:
        """Ask the plug-in: SGLang's own `/health` makes a token, which a paused engine cannot."""
        failed, last = super()._health(timeout_s)
        if last.startswith(f"HTTP {HTTPStatus.NOT_FOUND:d}"):
            raise self._absent()
        return failed, last

    def _refusal(self, path: str, response: httpx.Response) -> HeadraceError:
        if response.status_code == HTTPStatus.NOT_FOUND:
            return self._absent()
        if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            message = f"{self._url}{path} answered HTTP {response.status_code}; give SGLang's admin key with --header"
            return ConfigError(message, name=self._url)
        return super()._refusal(path, response)

    def _absent(self) -> BackendUnavailableError:
        message = f"{self._url} has no {ROUTE}: it is no SGLang, or one without Headrace's plug-in; {_START}"
        return BackendUnavailableError(message, name=self._url)
