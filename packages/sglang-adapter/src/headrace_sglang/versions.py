"""Which versions of SGLang this adapter knows."""

from __future__ import annotations

from headrace.adapter.versions import Supported

SUPPORTED = Supported("SGLang", "headrace-sglang", oldest=(0, 5, 23), newest=(0, 5))
