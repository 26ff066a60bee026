"""Runs an `LLM` in this one process through updates: `python offline_child.py SPEC.json OUT.json`.

SPEC holds `checkpoints` (the first is the engine's own), `prompt`, `num_tokens`, `unpacked`, and `engine`: options of
`LLM`. With `lora`, a folder, every question is asked with that adapter too. Where a draft model guesses, what it
guessed is part of the answer.
"""

from __future__ import annotations

import os
from typing import Any

from children import answer, states_over_updates

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
GUESSES: list[int] = []


def watch_guesses(worker: Any) -> None:
    """Note every token that the worker's draft model finds likeliest."""
    model = worker.model_runner.drafter.model
    compute = model.compute_logits

    def compute_logits(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        logits = compute(hidden, *args, **kwargs)
        GUESSES.extend(logits.argmax(-1).flatten().tolist())
        return logits

    model.compute_logits = compute_logits


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Answer, update, answer again, for every checkpoint."""
    if spec["unpacked"]:
        import nopack  # noqa: F401 - it changes vLLM when it is imported
    if spec["engine"].get("quantization") == "rounding":
        import rounding  # noqa: F401 - it registers that quantisation
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    import headrace_vllm

    small = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 512,
        "dtype": "float32",
    }
    llm = LLM(
        spec["checkpoints"][0],
        **{**small, "weight_transfer_config": {"backend": "headrace"}, **spec["engine"]},
    )
    if "speculative_config" in spec["engine"]:
        llm.collective_rpc(watch_guesses)
    sampling = SamplingParams(temperature=0, max_tokens=spec["num_tokens"], ignore_eos=True, logprobs=1)

    def ask(lora: object = None) -> dict[str, Any]:
        GUESSES.clear()
        out = llm.generate(
            [{"prompt_token_ids": spec["prompt"]}], sampling, use_tqdm=False, lora_request=lora
        )[0].outputs[0]
        return {
            "tokens": list(out.token_ids),
            "logprobs": [out.logprobs[i][t].logprob for i, t in enumerate(out.token_ids)],
            "guesses": list(GUESSES),
        }

    control = headrace_vllm.attach(llm)
    adapter = LoRARequest("one", 1, spec["lora"]) if spec.get("lora") else None

    def state() -> dict[str, Any]:
        adapted = {"adapted": ask(adapter)} if adapter else {}
        return {"answer": ask(), "version": control.served_version(10)} | adapted

    verify = spec.get("verify", "digest")
    return {"results": states_over_updates(control, spec["checkpoints"][1:], state, verify=verify)}


if __name__ == "__main__":
    answer(main)
