"""Updates of a real vLLM on one GPU: proven against transformers, timed beside vLLM's own ways to load.

`python -m benchmarks.vllm_gpu --folder DIR`; needs a vLLM for CUDA and headrace-vllm installed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks._common import Section
from benchmarks.vllm import ROOT, commit_of, empty_pause
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer
from headrace.testing.tiny_model import TinySize, make_tiny_qwen3, make_tiny_qwen3_moe

MODELS = {
    "dense": (
        make_tiny_qwen3,
        TinySize(num_layers=28, hidden=2048, intermediate=6144, num_heads=16, num_kv_heads=8, head_dim=128),
    ),
    "mixture": (
        make_tiny_qwen3_moe,
        TinySize(
            num_layers=24, hidden=512, intermediate=256, num_heads=8, num_kv_heads=4, head_dim=64, num_experts=64
        ),
    ),
}
PROMPT = list(range(10, 26))
NUM_TOKENS = 24
TURNS = 8
LOADED = (2, 3, 4)
COLUMNS = (
    "model", "GB", "first stall ms", "commit ms", "GB/s", "stall ms", "empty pause ms", "total ms",
    "load_weights ms", "layerwise ms", "route",
)  # fmt: skip


def run_engine(name: str, folder: Path) -> dict[str, Any]:
    """Be the engine: update again and again, answer after each, and let vLLM load by itself in between."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - only the engine's own process has it

    import headrace_vllm  # noqa: PLC0415

    paths = [folder / f"{name}-{seed}" for seed in (1, 2)]
    llm = LLM(
        str(paths[0]), enforce_eager=True, gpu_memory_utilization=0.4, max_model_len=512, dtype="bfloat16",
        weight_transfer_config={"backend": "headrace"}, disable_custom_all_reduce=True,
        worker_extension_cls="benchmarks._vllm_worker.BenchExtension",
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)

    def answer() -> dict[str, list[Any]]:
        made = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)[0].outputs[0]
        tokens = list(made.token_ids)
        return {"tokens": tokens, "logprobs": [made.logprobs[i][t].logprob for i, t in enumerate(tokens)]}

    control = headrace_vllm.attach(llm)
    answers, rows = [(0, answer())], []
    with ParameterServer(paths[0]) as one, ParameterServer(paths[1]) as two:
        for turn in range(TURNS):
            which = (turn + 1) % 2
            report = (one, two)[which].update(control, verify="full" if turn < 2 else "none")
            answers.append((which, answer()))
            row = {"commit": commit_of(report), "stall": report.stall_s, "total": report.total_s}
            row["empty"] = empty_pause(control)
            if turn in LOADED:
                row |= {
                    what: max(llm.collective_rpc(f"bench_{what}", args=(str(paths[which]),)))
                    for what in ("load_weights", "layerwise")
                }
            rows.append(row)
    return {"answers": answers, "rows": rows} | _last(report)


def _last(report: UpdateReport) -> dict[str, Any]:
    worker = report.workers[0]
    return {
        "bytes": report.live_bytes, "opaque": len(worker.opaque_names),
        "route": f"{worker.route} {worker.transport}", "ring": worker.ring, "version": report.version,
    }  # fmt: skip


@torch.inference_mode()
def wrong_answers(folder: Path, name: str, answers: list[tuple[int, dict[str, list[Any]]]]) -> list[str]:
    """Return which answers are not those of their weights.

    The first is of what vLLM loaded by itself; all of the same weights must equal it to the bit, and be nearer to what
    transformers computes from them than from the others. (In bfloat16 experts are chosen differently now and then.)
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    models = [
        AutoModelForCausalLM.from_pretrained(folder / f"{name}-{seed}", dtype=torch.bfloat16).to("cuda")
        for seed in (1, 2)
    ]
    found = []
    first: dict[int, dict[str, list[Any]]] = {}
    for turn, (which, answer) in enumerate(answers):
        if first.setdefault(which, answer) != answer:
            found.append(f"{name} answer {turn} is not the one that the same weights gave before")
        tokens = torch.tensor([PROMPT + answer["tokens"]], device="cuda")
        said = torch.tensor(answer["logprobs"], device="cuda")
        own, other = (
            float((_logprobs(models[index], tokens) - said).abs().max()) for index in (which, 1 - which)
        )
        if own >= other:
            found.append(f"{name} answer {turn}: {own:.3f} from its own weights, {other:.3f} from the others")
    return found


def _logprobs(model: Any, tokens: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - a transformers model
    logits = model(tokens).logits[0, len(PROMPT) - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(1, tokens[0, len(PROMPT) :, None])[:, 0]


def measure(name: str, folder: Path) -> tuple[str, ...]:
    """Make two versions of a model, run an engine on them in a process of its own, check it; return its row."""
    maker, size = MODELS[name]
    for seed in (1, 2):
        maker(folder / f"{name}-{seed}", seed, dtype="bfloat16", size=size)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": path}
    command = [sys.executable, "-m", "benchmarks.vllm_gpu", "--engine", name, "--folder", str(folder)]
    subprocess.run(command, env=os.environ | quiet, check=True)
    found = json.loads((folder / f"{name}.json").read_text())
    wrong = wrong_answers(folder, name, found["answers"])
    if wrong:
        sys.exit("\n".join(wrong))
    rows = found["rows"]
    middle = {key: median(row[key] for row in rows[2:] if key in row) for key in rows[LOADED[0]]}
    ms = {key: f"{value * 1e3:.1f}" for key, value in middle.items()}
    return (
        name, f"{found['bytes'] / 1e9:.2f}", f"{rows[0]['stall'] * 1e3:.1f}", ms["commit"],
        f"{found['bytes'] / middle['commit'] / 1e9:.1f}", ms["stall"], ms["empty"], ms["total"],
        ms["load_weights"], ms["layerwise"], f"{found['route']} ({found['ring']}), {found['opaque']} opaque",
    )  # fmt: skip


def main() -> None:
    """Print the table; exit code 1 where an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=tuple(MODELS), action="append", help="only this one; repeatable")
    parser.add_argument("--folder", type=Path, help="where models are made and kept")
    chosen = parser.parse_args()
    if chosen.engine:
        found = run_engine(chosen.engine, chosen.folder)
        (chosen.folder / f"{chosen.engine}.json").write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)
    import vllm  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as made:
        rows = tuple(measure(name, chosen.folder or Path(made)) for name in chosen.model or MODELS)
        notes = (
            f"Medians of updates 3 to {TURNS}, verify none (first two: full). {TURNS + 1} answers a model, equal to "
            "the bit wherever the weights were, vLLM's own first load included.",
        )
        title = f"vLLM {vllm.__version__} on one {torch.cuda.get_device_name()}"
        Section("vllm-gpu", title, COLUMNS, rows, notes).show(Console(width=220))


if __name__ == "__main__":
    main()
