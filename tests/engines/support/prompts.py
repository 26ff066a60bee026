"""Names that tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RunOffline = Callable[..., list[dict[str, Any]]]
PROMPT = [10, 11, 12, 13, 14, 15, 16, 17]
