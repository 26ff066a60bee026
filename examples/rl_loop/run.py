"""A tiny but real GRPO loop on a laptop: an engine, two trainer ranks, and a plot of the reward, in a few minutes.

    pip install './packages/core[engine,plot]' ./packages/trainer-hooks
    python examples/rl_loop/run.py                          # FSDP2 and the embedded engine
    python examples/rl_loop/run.py --framework deepspeed    # ZeRO-3
    python examples/rl_loop/run.py --engine vllm=http://127.0.0.1:8000 --model DIR   # see README.md beside this

The policy learns to speak of water: the reward is the share of tokens that begin such a word. Every rollout comes from
the policy of the last step, as the step returns when the engine serves its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from headrace.testing.engine_process import EngineProcess
from headrace.testing.tiny_model import TinySize, make_tiny_qwen3

SIZE = TinySize(head_dim=32)  # what attention kernels of engines take


def train(model: Path, engine: str, out: Path, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the ranks to their end and return what rank 0 wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(chosen.ranks)]
    command += [str(Path(__file__).with_name("train.py")), "--model", str(model), "--engine", engine]
    command += ["--framework", chosen.framework, "--steps", str(chosen.steps), "--out", str(out)]
    accelerator = {"DS_ACCELERATOR": "cpu"} if chosen.framework == "deepspeed" else {}
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | accelerator)
    return [json.loads(line) for line in out.read_text().splitlines()]


def plot(lines: list[dict[str, Any]], file: Path) -> None:
    """Write the reward over the run."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["reward"] for line in lines])
    axes.set_xlabel("optimizer step, each served by the live engine before the next")
    axes.set_ylabel("share of words about water")
    axes.set_title("GRPO over a live engine")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run it; exits with an error where the policy has learned nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("fsdp", "deepspeed"), default="fsdp")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--engine", help="ENGINE=URL that serves --model; default: an embedded engine.")
    parser.add_argument("--model", type=Path, help="Checkpoint to start from; default: a random tiny Qwen3.")
    parser.add_argument("--write-model", type=Path, metavar="DIR", help="Write that tiny Qwen3, and do nothing else.")
    parser.add_argument("--plot", type=Path, default=Path("reward.png"))
    chosen = parser.parse_args()
    if chosen.write_model:
        make_tiny_qwen3(chosen.write_model, 3, size=SIZE)
        return
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = chosen.model or make_tiny_qwen3(scratch / "model", 3, size=SIZE)
        engine = chosen.engine or stack.enter_context(EngineProcess(model, 1, "--dtype", "float32")).target
        lines = train(model, engine, scratch / "steps.jsonl", chosen)
    plot(lines, chosen.plot)
    tenth = max(1, len(lines) // 10)
    first, last = (sum(line["reward"] for line in part) / tenth for part in (lines[:tenth], lines[-tenth:]))
    print(f"reward {first:.3f} -> {last:.3f} in {len(lines)} steps; plot: {chosen.plot}")
    if last <= first:
        sys.exit("the policy has learned nothing")


if __name__ == "__main__":
    main()
