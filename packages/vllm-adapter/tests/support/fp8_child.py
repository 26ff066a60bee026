"""Runs an `LLM` on a GPU in this one process through updates: `python fp8_child.py SPEC.json OUT.json`.

SPEC holds `checkpoints` (the first is the engine's own) and `engine`: options of `LLM`. Each state of the result has a
digest of all parameters, byte by byte, and what the engine answers.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from children import answer, states_over_updates

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
PROMPT = list(range(10, 26))


def digests(worker: Any) -> dict[str, str]:
    """Return a digest per parameter of the worker's model."""
    found = {}
    for name, parameter in worker.model_runner.get_model().named_parameters():
        flat = parameter.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
        found[name] = f"{parameter.dtype} {tuple(parameter.shape)} {hashlib.sha256(flat).hexdigest()}"
    return found


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, then update, for every checkpoint; note the state after each."""
    from vllm import LLM, SamplingParams

    import headrace_vllm

    options = {
        "enforce_eager": True, "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 256 << 20, "max_model_len": 512,
        "disable_custom_all_reduce": True,
        "weight_transfer_config": {"backend": "headrace"},
    }  # fmt: skip
    llm = LLM(spec["checkpoints"][0], **{**options, **spec["engine"]})
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)

    def state() -> dict[str, Any]:
        made = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)[0].outputs[0]
        (found,) = llm.collective_rpc(digests)
        return {"digests": found, "tokens": list(made.token_ids)}

    return {"states": states_over_updates(headrace_vllm.attach(llm), spec["checkpoints"][1:], state)}


if __name__ == "__main__":
    answer(main)
