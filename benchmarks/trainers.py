"""What a hook costs a training step, and how soon engines serve it, beside gathering, saving and loading.

Run as `python -m benchmarks.trainers`, where DeepSpeed is installed (`nox -s trainers` has such an environment). Two
ranks train Qwen3-0.6B for real while an engine with two workers serves it. About 16 GB of memory on a CPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from benchmarks._common import Section, Spread, machine, wait_for_quiet
from benchmarks._models import DENSE, NUM_WORKERS, worker_backend
from benchmarks._trainer_rank import Run, Seconds, measure
from headrace.protocols import InferenceBackend
from headrace.testing.bare_engine import BareEngine
from headrace.testing.engine_process import EngineProcess, free_port
from headrace.testing.ranks import run_ranks
from headrace.testing.shapes import QWEN3_06B
from headrace.testing.tiny_model import make_tiny_qwen3

NUM_RANKS = 2
RUN_S = 1500.0
TARGET_SHARE = 0.05


def make_config(folder: Path, layers: int) -> Path:
    """Write the configuration of Qwen3-0.6B, with so many layers, into `folder`."""
    shape = QWEN3_06B
    with tempfile.TemporaryDirectory() as tiny:
        AutoTokenizer.from_pretrained(make_tiny_qwen3(Path(tiny), 1)).save_pretrained(folder)
    AutoConfig.for_model(
        "qwen3",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def load_seconds(file: str) -> float:
    """Return how long an engine's own loader takes over a file, the slower of its workers."""
    with BareEngine(worker_backend, NUM_WORKERS, DENSE, 0) as engine:
        return float(max(engine.call_all(_load, file)))


def _load(backend: InferenceBackend, _receiver: object, file: str) -> float:
    begin = time.monotonic()
    with safe_open(file, "pt") as opened:
        backend.load((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 - no mapping
    return time.monotonic() - begin


def section(name: str, run: Run, found: Seconds, load_s: float | None) -> Section:
    """Return one framework's table."""
    without, beside = Spread.of(found.without), Spread.of(found.beside)
    held, copy = Spread.of(found.held), Spread.of(found.copy)
    updates = [report.update for report in found.reports if report.update]
    total = Spread.of([update.total_s for update in updates])
    gather, save = Spread.of(found.gather), Spread.of(found.save)
    usual_s = gather.median + save.median + (load_s or 0.0)
    rows = (
        ("a step without a hook", without.ms()),
        ("a step while updates go on beside it", beside.ms()),
        ("... of which held up by the fence", held.ms()),
        ("copying the rank's shard, one plain copy with the cast", copy.ms()),
        ("Headrace: copying it, as reported", Spread.of([update.read_s for update in updates]).ms()),
        ("Headrace: from the step's end to engines serving", total.ms()),
        ("Headrace: stall of the engine", Spread.of([update.stall_s for update in updates]).ms()),
        ("the usual way: gathering everything, training stands", gather.ms()),
        ("the usual way: saving it", save.ms()),
        ("the usual way: the engine's own loader", "-" if load_s is None else f"{load_s * 1e3:.1f}"),
        ("the usual way, together", f"{usual_s * 1e3:.1f}"),
        ("extra memory per rank, MB", f"{found.extra_bytes / 1e6:.1f}"),
        ("the rank's shard in bfloat16, MB", f"{found.shard_bytes / 1e6:.1f}"),
    )
    added_s = beside.median - without.median
    room_s = TARGET_SHARE * without.median + copy.median
    notes = (
        f"Added to a step: {added_s * 1e3:.0f} ms, {added_s / without.median:+.0%}; to reach: at most "
        f"{room_s * 1e3:.0f} ms ({TARGET_SHARE:.0%} of a step and the copy).",
        f"{len(found.beside)} steps, {len(updates)} versions served; verify {run.verify}, {run.device}, "
        f"{found.params / 1e9:.2f} B parameters.",
    )
    title = f"{name}, {NUM_RANKS} ranks, engine with {NUM_WORKERS} workers: ms, median (least-greatest)"
    return Section(f"trainers-{name}", title, ("what", "value"), rows, notes)


def sections(frameworks: Sequence[str], chosen: argparse.Namespace) -> list[Section]:
    """Measure everything."""
    found = []
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="headrace-", dir=chosen.scratch) as scratch:
        model = make_config(Path(scratch) / "model", chosen.layers)
        for name in frameworks:
            wait_for_quiet()
            options = ("--load-format", "dummy", "--dtype", "bfloat16", "--device", chosen.device)
            with EngineProcess(model, NUM_WORKERS, *options) as engine:
                saved = str(Path(scratch) / f"{name}.safetensors")
                run = Run(
                    framework=name,
                    model=str(model),
                    url=engine.url,
                    port=free_port(),
                    steps=chosen.steps,
                    rounds=chosen.rounds,
                    device=chosen.device,
                    verify=chosen.verify,
                    saved=saved,
                )
                seconds = run_ranks(measure, NUM_RANKS, RUN_S, run)[0]
            is_whole = chosen.layers == QWEN3_06B.layers
            found.append(section(name, run, seconds, load_seconds(saved) if is_whole else None))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frameworks", nargs="*", default=["fsdp2", "zero3"], metavar="fsdp2|zero3")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=QWEN3_06B.layers)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--verify", choices=("none", "digest"), default="digest")
    parser.add_argument("--scratch", help="Folder for a few GB.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for one in (*sections(chosen.frameworks, chosen), machine()):
        one.show(Console(width=140))


if __name__ == "__main__":
    main()
