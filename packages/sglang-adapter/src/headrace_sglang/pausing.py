"""The pause, and what is said where SGLang does not drop its KV. Needs no SGLang."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from headrace.errors import RemoteProtocolError

if TYPE_CHECKING:
    from headrace.protocols import EngineControl
    from headrace.types import CacheMode


def pause_within(
    control: EngineControl, pause_once: Callable[[CacheMode, float], str], cache: CacheMode, deadline_s: float
) -> None:
    """Pause an engine.

    Args:
        control: The engine.
        pause_once: Pauses within a number of seconds; returns why KV was not dropped, or nothing.
        cache: What becomes of KV.
        deadline_s: Limit.

    Raises:
        RemoteProtocolError: A replica did not drop its KV. The engine is paused.
    """
    refusal = pause_once(cache, deadline_s)
    if refusal:
        raise _undropped(control.address, refusal)


def _undropped(address: str, refusal: str) -> RemoteProtocolError:
    message = f"{address} could not drop its KV: {refusal}; update again, or with --cache keep"
    return RemoteProtocolError(message, name=address, retryable=True)
