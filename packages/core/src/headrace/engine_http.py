"""HttpEngine: what every EngineControl over HTTP shares - waiting for the engine, requests with deadlines, errors."""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar

import httpx
import msgspec

from headrace.errors import (
    ConnectError,
    HeadraceError,
    RemoteFailure,
    RemoteProtocolError,
    TransferTimeoutError,
)

_POLL_S = 0.1
_POLL_TIMEOUT_S = 5.0


class HttpEngine:
    """The engine-neutral half of an EngineControl over HTTP. Proxies of the environment are not used.

    Subclasses add the engine's own routes; `_request` is how.

    Attributes:
        health: Route that answers with success where the engine is ready, paused or not.
    """

    health: ClassVar[str] = "/health"

    def __init__(
        self, url: str, headers: Mapping[str, str] | None = None, verify: ssl.SSLContext | bool = True
    ) -> None:
        """Prepare a client; nothing is sent.

        Args:
            url: Base URL, `http://HOST:PORT`.
            headers: Sent with every request (API keys).
            verify: Whether, or how, certificates are checked.
        """
        self._url = url.rstrip("/")
        self._client = httpx.Client(
            base_url=self._url, headers=dict(headers or {}), verify=verify, trust_env=False
        )

    @property
    def address(self) -> str:
        """The base URL."""
        return self._url

    def wait_ready(self, deadline_s: float) -> None:
        """Poll until the engine is ready.

        Raises:
            ConnectError: Not within the deadline, or the engine says that it has failed.
        """
        end = time.monotonic() + deadline_s
        while True:
            failed, last = self._health(max(0.01, min(_POLL_TIMEOUT_S, end - time.monotonic())))
            if not last:
                return
            if failed or time.monotonic() + _POLL_S >= end:
                message = (
                    f"{self._url} is not ready: GET {self.health} for {deadline_s:g} s, last answer: {last}; "
                    "check the address, headers and certificates, and the engine's log"
                )
                raise ConnectError(message, name=self._url, retryable=not failed)
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Close connections."""
        self._client.close()

    def _health(self, timeout_s: float) -> tuple[bool, str]:
        """Return whether the engine has failed for good, and what it answered; nothing where it is ready."""
        try:
            response = self._client.get(self.health, timeout=timeout_s)
        except httpx.InvalidURL as error:
            return True, str(error)
        except httpx.HTTPError as error:
            return _is_final(error), f"{type(error).__name__}: {error}"
        if response.is_success:
            return False, ""
        text = response.text.strip()[:300]
        refused = response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        return refused or '"failed"' in text, f"HTTP {response.status_code} {text}"

    def _request(self, method: str, path: str, deadline_s: float, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        """Send one request and return the decoded answer, empty where it is no JSON object.

        Raises:
            TransferTimeoutError: No answer within the deadline.
            ConnectError: The engine cannot be reached.
            HeadraceError: The engine refused; its own error where it sent one, else `RemoteProtocolError`.
        """
        response = self._send(method, path, deadline_s, **options)
        if not response.is_success:
            raise self._refusal(path, response)
        return decoded(response) or {}

    def _send(self, method: str, path: str, deadline_s: float, **options: Any) -> httpx.Response:  # noqa: ANN401
        try:
            return self._client.request(method, path, timeout=deadline_s, **options)
        except httpx.TimeoutException as error:
            message = f"{self._url}{path} did not answer within {deadline_s:g} s"
            raise TransferTimeoutError(message, name=self._url, retryable=True) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            message = f"{self._url}{path} cannot be reached ({type(error).__name__}: {error}); is it running?"
            raise ConnectError(message, name=self._url, retryable=True) from error

    def _refusal(self, path: str, response: httpx.Response) -> HeadraceError:
        body = (decoded(response) or {}).get("error")
        if not isinstance(body, dict):
            text = response.text.strip()[:300]
            return RemoteProtocolError(
                f"{self._url}{path} answered HTTP {response.status_code}: {text}", name=self._url
            )
        failure = RemoteFailure(
            type_name=str(body.get("type")),
            message=f"{self._url}{path}: {body.get('message')}",
            weights_state=body.get("weights_state", "old"),
        )
        return failure.to_error()


def _is_final(error: BaseException) -> bool:
    """Return whether asking again cannot help: no such protocol, or certificates that one side does not accept."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, httpx.UnsupportedProtocol):
            return True
        if isinstance(cause, ssl.SSLError):
            return not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        cause = cause.__cause__ or cause.__context__
    return False


def decoded(response: httpx.Response) -> dict[str, Any] | None:
    """Return the JSON object of an answer, or None where it is none."""
    try:
        return msgspec.json.decode(response.content, type=dict[str, Any])
    except msgspec.DecodeError:
        return None
