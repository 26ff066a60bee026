"""Runs an `Engine` through updates: `python offline_child.py SPEC.json OUT.json`.

SPEC holds `checkpoints` (the first is the engine's own), `prompt`, `num_tokens` and `engine`: options of `Engine`.
"""

from __future__ import annotations

import os
from typing import Any

from children import answer, states_over_updates
from sglang_server import SMALL, answer_of

if os.environ.get("HEADRACE_TEST_PACKED") == "1":
    import packed  # noqa: F401 - schedulers are started anew and import this module too


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Answer, update, answer again, for every checkpoint."""
    import sglang

    import headrace_sglang

    options = {**SMALL, "log_level": "error", **spec["engine"]}
    engine = sglang.Engine(model_path=spec["checkpoints"][0], **options)
    sampling = {"temperature": 0.0, "max_new_tokens": spec["num_tokens"], "ignore_eos": True}
    control = headrace_sglang.attach(engine)

    def state() -> dict[str, Any]:
        out = engine.generate(input_ids=spec["prompt"], sampling_params=sampling, return_logprob=True)
        return {"answer": answer_of(out), "version": control.served_version(10)}

    choices = {"verify": spec["verify"], "cache": spec["cache"]}
    results = states_over_updates(control, spec["checkpoints"][1:], state, **choices)
    engine.shutdown()
    return {"results": results}


if __name__ == "__main__":
    answer(main)
