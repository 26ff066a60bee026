"""Updates an `LLM` while it sleeps, then awake: `python sleeping_child.py SPEC.json OUT.json`.

SPEC holds two `checkpoints`; the engine starts with the first. On a CPU vLLM itself keeps the memory.
"""

from __future__ import annotations

import os
from typing import Any

from children import answer, states_over_updates

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Sleep, update, wake the weights up, update again."""
    from vllm import LLM

    import headrace_vllm

    start, new = spec["checkpoints"]
    llm = LLM(
        start, enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=512, dtype="float32",
        weight_transfer_config={"backend": "headrace"},
    )  # fmt: skip
    control = headrace_vllm.attach(llm)

    def state() -> dict[str, Any]:
        return {"version": control.served_version(10)}

    llm.sleep(level=2)
    asleep = states_over_updates(control, [new], state)[1]
    llm.wake_up(tags=["weights"])
    return {"asleep": asleep, "awake": states_over_updates(control, [new], state)[1]}


if __name__ == "__main__":
    answer(main)
