"""Runs an `Engine` through updates: `python offline_child.py SPEC.json OUT.json`.

SPEC holds `checkpoints` (the first is the engine's own), `prompt`, `num_tokens` and `engine`: options of `Engine`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from sglang_server import SMALL, answer_of

if os.environ.get("HEADRACE_TEST_PACKED") == "1":
    import packed  # noqa: F401 - schedulers are started anew and import this module too


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Answer, update, answer again, for every checkpoint."""
    import sglang

    import headrace_sglang
    from headrace.errors import HeadraceError
    from headrace.server.parameter_server import ParameterServer

    options = {**SMALL, "log_level": "error", **spec["engine"]}
    engine = sglang.Engine(model_path=spec["checkpoints"][0], **options)
    sampling = {"temperature": 0.0, "max_new_tokens": spec["num_tokens"], "ignore_eos": True}
    control = headrace_sglang.attach(engine)

    def state() -> dict[str, Any]:
        out = engine.generate(input_ids=spec["prompt"], sampling_params=sampling, return_logprob=True)
        return {"answer": answer_of(out), "version": control.served_version(10)}

    results: list[dict[str, Any]] = [state()]
    for checkpoint in spec["checkpoints"][1:]:
        result: dict[str, Any] = {}
        with ParameterServer(checkpoint) as server:
            try:
                report = server.update(control, verify=spec["verify"], cache=spec["cache"])
                result["opaque"] = len(report.workers[0].opaque_names)
                result["unused"] = list(report.unused_names)
            except HeadraceError as error:
                result["error"], result["weights_state"] = str(error), error.weights_state
        results.append(result | state())
    engine.shutdown()
    return {"results": results}


if __name__ == "__main__":
    told = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)
