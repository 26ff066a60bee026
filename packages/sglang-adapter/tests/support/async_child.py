"""Updates an `Engine` while it answers in an event loop: `python async_child.py SPEC.json OUT.json`."""

from __future__ import annotations

import asyncio
from typing import Any

from children import answer, update_while_answering
from sglang_server import SMALL, answer_of


async def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Ask again and again while an update is made; one request is in flight over it."""
    import sglang

    import headrace_sglang

    engine = sglang.Engine(model_path=spec["checkpoints"][0], **SMALL, log_level="error")
    control = headrace_sglang.attach(engine)
    sampling = {"temperature": 0.0, "max_new_tokens": spec["num_tokens"], "ignore_eos": True}
    begun = asyncio.Event()

    async def ask(_number: int) -> dict[str, Any]:
        stream = await engine.async_generate(
            input_ids=spec["prompt"], sampling_params=sampling, return_logprob=True, stream=True
        )
        async for out in stream:
            begun.set()
            last = out
        return answer_of(last)

    result = await update_while_answering(control, spec["checkpoints"][1], ask, begun)
    engine.shutdown()
    return result


if __name__ == "__main__":
    answer(lambda spec: asyncio.run(main(spec)))
