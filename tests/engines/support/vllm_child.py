"""A vLLM server behind pipes, for tests that run beside another engine: `python vllm_child.py MODEL LOG`.

Writes one line of JSON with the server's target, then an answer for every line of JSON that comes in: a method and its
arguments. It ends when its input does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "packages" / "vllm-adapter" / "tests" / "support"))

from vllm_server import VllmServer  # noqa: E402


def main(model: Path, log: Path) -> None:
    """Start the server, and do what is asked of it."""
    with VllmServer(model, log=log) as server:
        _say(server.target)
        for line in sys.stdin:
            method, *arguments = json.loads(line)
            _say(getattr(server, method)(*arguments))


def _say(answer: object) -> None:
    sys.stdout.write(f"{json.dumps(answer)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
