"""A vLLM server whose processes all keep live weights in the loader's layout: spawned ones import this module too.

For servers whose only worker extension is Headrace's. With `BATCHES_AHEAD` in its environment, the engine core hands
out so many batches before it takes the first one's tokens, as on GPUs: on CPUs vLLM does not.
"""

from __future__ import annotations

import os
import runpy

import nopack  # noqa: F401 - it changes vLLM when it is imported
from vllm.config import VllmConfig

if "BATCHES_AHEAD" in os.environ:
    VllmConfig.max_concurrent_batches = property(lambda _config: int(os.environ["BATCHES_AHEAD"]))

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
