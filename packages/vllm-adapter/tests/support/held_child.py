"""Updates an `AsyncLLM` by holds while it answers streams: `python held_child.py SPEC.json OUT.json`.

SPEC holds two `checkpoints`, which take turns and of which the engine starts with the first, `updates`, `streams`, and
`engine`: options of `AsyncEngineArgs`. The result has every stream's tokens, the first token asked included, and what
each update reports.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from children import answer
from safetensors.torch import load_file

os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING"}
NUM_TOKENS = 400


async def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Answer without a break; update so many times, then ask once more."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    import headrace_vllm
    from headrace.server.parameter_server import ParameterServer

    options = {"max_model_len": 512, "dtype": "bfloat16", "weight_transfer_config": {"backend": "headrace"}}
    options |= {"disable_custom_all_reduce": True, "enable_prefix_caching": False, **spec["engine"]}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=spec["checkpoints"][0], **options))
    control = headrace_vllm.attach(llm)
    streams: list[list[int]] = []
    asking = [asyncio.create_task(_ask_on(llm, number, streams)) for number in range(spec["streams"])]
    reports = []
    with ExitStack() as stack:
        sources = [
            stack.enter_context(ParameterServer(tensors=load_file(Path(folder) / "model.safetensors")))
            for folder in spec["checkpoints"]
        ]
        for turn in range(spec["updates"]):
            source = sources[(turn + 1) % 2]
            report = await asyncio.to_thread(source.update, control, cache="keep", barrier="hold")
            worker = report.workers[0]
            reports.append({"barrier": report.engines[0].barrier, "ring": worker.ring, "stall_s": report.stall_s})
            await asyncio.sleep(0.3)
    for task in asking:
        task.cancel()
    last: list[list[int]] = []
    await _ask(llm, "last", last, 32)
    return {"streams": streams, "last": last[0], "reports": reports}


async def _ask_on(llm: Any, number: int, streams: list[list[int]]) -> None:
    turn = 0
    while True:
        await _ask(llm, f"{number}-{turn}", streams, NUM_TOKENS)
        turn += 1


async def _ask(llm: Any, request: str, streams: list[list[int]], num_tokens: int) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    tokens = [10 + hash(request) % 200]
    streams.append(tokens)
    async for out in llm.generate({"prompt_token_ids": list(tokens)}, sampling, request):
        tokens.extend(out.outputs[0].token_ids)


if __name__ == "__main__":
    answer(lambda spec: asyncio.run(main(spec)))
