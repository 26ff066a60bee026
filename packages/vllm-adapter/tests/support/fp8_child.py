"""Runs an `LLM` on a GPU in this one process through updates: `python fp8_child.py SPEC.json OUT.json`.

SPEC holds `checkpoints` (the first is the engine's own) and `engine`: options of `LLM`. Each state of the result has a
digest of all parameters, byte by byte, and what the engine answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

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
    from headrace.errors import HeadraceError
    from headrace.server.parameter_server import ParameterServer

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

    control = headrace_vllm.attach(llm)
    states = [state()]
    for checkpoint in spec["checkpoints"][1:]:
        result: dict[str, Any] = {}
        with ParameterServer(checkpoint) as server:
            try:
                worker = server.update(control).workers[0]
                result = {"opaque": len(worker.opaque_names), "ring": worker.ring}
            except HeadraceError as error:
                result = {"error": str(error), "weights_state": error.weights_state}
        states.append(result | state())
    return {"states": states}


if __name__ == "__main__":
    told = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)
