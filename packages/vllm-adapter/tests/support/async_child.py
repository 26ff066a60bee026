"""Updates an `AsyncLLM` of this process while it answers: `python async_child.py SPEC.json OUT.json`."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from children import answer, update_while_answering

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR"}


async def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Ask again and again while an update is made; one request is in flight over it."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    import headrace_vllm

    arguments = AsyncEngineArgs(
        model=spec["checkpoints"][0],
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        max_model_len=512,
        dtype="float32",
        weight_transfer_config={"backend": "headrace"},
        **spec.get("engine", {}),
    )
    llm = AsyncLLM.from_engine_args(arguments)
    control = headrace_vllm.attach(llm)
    sampling = SamplingParams(temperature=0, max_tokens=spec["num_tokens"], ignore_eos=True, logprobs=1)
    begun = asyncio.Event()

    async def ask(number: int) -> dict[str, Any]:
        async for out in llm.generate({"prompt_token_ids": spec["prompt"]}, sampling, f"r{number}"):
            begun.set()
            last = out.outputs[0]
        versions = [""] * len(last.token_ids)
        for span in last.weight_versions:
            versions[span.start : span.end] = [span.version] * (span.end - span.start)
        logprobs = [last.logprobs[i][t].logprob for i, t in enumerate(last.token_ids)]
        return {"tokens": list(last.token_ids), "logprobs": logprobs, "versions": versions}

    result = await update_while_answering(control, spec["checkpoints"][1], ask, begun, **spec.get("update", {}))
    llm.shutdown()
    return result


if __name__ == "__main__":
    answer(lambda spec: asyncio.run(main(spec)))
