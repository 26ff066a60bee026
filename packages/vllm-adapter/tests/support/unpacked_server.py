"""A vLLM server whose processes all keep live weights in the loader's layout: spawned ones import this module too.

For servers whose only worker extension is Headrace's.
"""

from __future__ import annotations

import runpy

import nopack  # noqa: F401 - it changes vLLM when it is imported

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
