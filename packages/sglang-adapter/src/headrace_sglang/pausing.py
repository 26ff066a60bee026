"""The pause, and what is done where SGLang cannot drop its KV at once. Needs no SGLang."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from headrace.errors import TransferTimeoutError

if TYPE_CHECKING:
    from headrace.protocols import EngineControl
    from headrace.types import CacheMode

_FIRST_S, _LONGEST_S = 0.05, 1.0


def pause_within(
    control: EngineControl, pause_once: Callable[[CacheMode, float], str], cache: CacheMode, deadline_s: float
) -> None:
    """Pause an engine; where a scheduler cannot drop its KV yet, let it serve for a moment, ever longer, and try again.

    Waiting in the pause would not help: what keeps SGLang from a flush is only ended by the steps that a pause stops.

    Args:
        control: The engine.
        pause_once: Pauses within a number of seconds; returns why KV was not dropped, or nothing.
        cache: What becomes of KV.
        deadline_s: Limit for all of it.

    Raises:
        TransferTimeoutError: KV was not dropped within the deadline. The engine is paused.
    """
    limit, moment_s = time.monotonic() + deadline_s, _FIRST_S
    while True:
        begin = time.monotonic()
        refusal = pause_once(cache, max(_FIRST_S, limit - begin))
        if not refusal:
            return
        end = time.monotonic()
        if end + moment_s + 2 * (end - begin) > limit:
            raise _undropped(control.address, deadline_s, refusal)
        control.resume(limit - end)
        time.sleep(moment_s)
        moment_s = min(2 * moment_s, _LONGEST_S)


def _undropped(address: str, deadline_s: float, refusal: str) -> TransferTimeoutError:
    message = (
        f"{address} could not drop its KV within {deadline_s:g} s: {refusal}; grammars that still compile and "
        "transfers of HiCache are in the way; update again, or with --cache keep"
    )
    return TransferTimeoutError(message, name=address, retryable=True)
