"""Paths of the routes that the plug-in adds to SGLang's server, known on both sides."""

from __future__ import annotations

ROUTE = "/headrace"
PAUSE_ROUTE = f"{ROUTE}/pause"
