"""Which versions of vLLM this adapter knows."""

from __future__ import annotations

from headrace.adapter.versions import Supported

_KNOWN = Supported("vLLM", "headrace-vllm", oldest=(0, 26), newest=(0, 32))
SUPPORTED = str(_KNOWN)
check_version = _KNOWN.check
