"""The reference EngineControl: an embedded engine over HTTP."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.engine_http import HttpEngine
from headrace.errors import RemoteProtocolError
from headrace.protocols import Ticket
from headrace.types import CacheMode


class TorchControl(HttpEngine):
    """EngineControl over the HTTP interface of `headrace engine`."""

    def expected_receivers(self, deadline_s: float) -> int:
        """Return the number of workers."""
        count = self._status(deadline_s).get("world_size")
        if not isinstance(count, int):
            raise RemoteProtocolError(
                f"{self._url}/headrace/status has no world_size; is it an embedded engine?"
            )
        return count

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:
        """Hand the ticket to every worker's receiver."""
        self._request("POST", "/headrace/enrol", deadline_s, content=msgspec.json.encode(ticket))

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        """Stop steps and keep requests; returns when no step runs."""
        self._request(
            "POST", "/pause", deadline_s, params={"cache": cache, "timeout_s": f"{min(deadline_s, 600.0):g}"}
        )

    def confirm(self, version: int, deadline_s: float) -> None:
        """Do nothing: the engine's workers report the version themselves."""

    def resume(self, deadline_s: float) -> None:
        """Let steps go on; the engine refuses while its weights are mixed."""
        self._request("POST", "/resume", deadline_s)

    def served_version(self, deadline_s: float) -> int | None:
        """Return the version that all ranks report, or None."""
        version = self._status(deadline_s).get("weight_version")
        return version if isinstance(version, int) else None

    def _status(self, deadline_s: float) -> dict[str, Any]:
        return self._request("GET", "/headrace/status", deadline_s)
