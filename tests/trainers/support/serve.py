"""Serves a model with a real vLLM or SGLang until stdin closes; run by the Python that has the engine.

`python serve.py vllm|sglang MODEL WORKERS LOG` prints the engine's target when it is ready, then, for every prompt that
it reads as a JSON list of tokens, a greedy answer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).parents[3] / "packages"


def main() -> None:
    """Start, say so, wait."""
    kind, model, workers, log = sys.argv[1:]
    sys.path.insert(0, str(PACKAGES / f"{kind}-adapter" / "tests" / "support"))
    server: Any
    if kind == "vllm":
        from vllm_server import VllmServer

        options = ("--tensor-parallel-size", workers)
        server = VllmServer(Path(model), *options, log=Path(log), unpacked=True)
    else:
        from sglang_server import SglangServer

        server = SglangServer(Path(model), "--tp", workers, log=Path(log), workers=int(workers))
    with server:
        _say(server.target)
        for line in sys.stdin:
            _say(json.dumps(server.generate(json.loads(line), 12)))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
