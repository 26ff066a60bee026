"""What a hook costs a training step, and how soon engines serve it, beside gathering, saving and loading.

Run as `python -m benchmarks.trainers`, where DeepSpeed is installed (`nox -s trainers` has such an environment). Two
ranks train Qwen3-0.6B for real while an engine with two workers serves it. Every other step is published: steps with an
update beside them and steps without alternate, and what is added is the median of the differences of neighbours.

Where ranks and engine share processors, part of that is the engine's work, not the hook's: processor time is counted
apart, and `--engine-nice 19` leaves the engine only what training does not use. About 16 GB of memory on a CPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import msgspec
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from benchmarks._common import Section, Spread, machine, wait_for_quiet
from benchmarks._models import NUM_WORKERS, Model, qwen3_options, worker_backend
from benchmarks._trainer_rank import Measured, Run, Step, measure
from benchmarks.all import report
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
    with tempfile.TemporaryDirectory() as tiny:
        AutoTokenizer.from_pretrained(make_tiny_qwen3(Path(tiny), 1)).save_pretrained(folder)
    AutoConfig.for_model("qwen3", dtype="bfloat16", **qwen3_options(layers)).save_pretrained(folder)
    return folder


def load_seconds(file: str, layers: int) -> float:
    """Return how long an engine's own loader takes over a file, the slower of its workers."""
    model = Model("trained", replace(QWEN3_06B, layers=layers))
    with BareEngine(worker_backend, NUM_WORKERS, model, 0) as engine:
        return float(max(engine.call_all(_load, file)))


def _load(backend: InferenceBackend, _receiver: object, file: str) -> float:
    begin = time.monotonic()
    with safe_open(file, "pt") as opened:
        backend.load((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 - no mapping
    return time.monotonic() - begin


def step_section(name: str, run: Run, ranks: Sequence[Measured], nice: int) -> Section:
    """Return what updates in the background add to a step."""
    first = ranks[0]
    without, idle, beside = (_spread(steps) for steps in (first.without, first.idle, first.beside))
    differences = [b.seconds - a.seconds for a, b in zip(first.idle, first.beside, strict=True)]
    added = Spread.of(differences)
    copy_s = max(Spread.of(rank.copy).median for rank in ranks)
    room_s = TARGET_SHARE * idle.median + copy_s
    hook_s = sum(_more(rank, lambda step: step.hook_cpu_s) for rank in ranks)
    engine_s = _more(first, lambda step: step.engine_cpu_s)
    rows = (
        ("a step without a hook", without.ms()),
        ("a step with a hook, nothing to publish", idle.ms()),
        ("the next one, beside an update", beside.ms()),
        ("added, step by step", added.ms()),
        (f"the same, mean of {len(differences)} pairs of steps", f"{mean(differences) * 1e3:.1f}"),
        ("of it held up by the fence", Spread.of([step.held_s for step in first.beside]).ms()),
        (f"to reach: {TARGET_SHARE:.0%} of a step and the copy", f"{room_s * 1e3:.1f}"),
        ("one plain copy of the rank's shard with the cast, ranks at once", f"{copy_s * 1e3:.1f}"),
        ("processor time of an update: the hook in all ranks (copy, digests, plan)", f"{hook_s * 1e3:.0f}"),
        ("processor time of an update: the engine", f"{engine_s * 1e3:.0f}"),
    )
    priority = f" of niceness {nice}" if nice else ""
    own_s, share = hook_s / len(ranks), engine_s / (hook_s + engine_s)
    notes = (
        f"Added: {added.median / idle.median:+.1%} of a step; {os.cpu_count()} cores for {len(ranks)} ranks and "
        f"{NUM_WORKERS} workers{priority}.",
        f"{share:.0%} of an update's processor time is the engine's, which elsewhere has cores of its own; the hook's "
        f"is {own_s * 1e3:.0f} ms per rank, {own_s / idle.median:.1%} of a step.",
        _late(first),
    )
    return Section(f"trainers-{name}-step", _title(name, first, run), ("training step", "ms"), rows, notes)


def _late(first: Measured) -> str:
    ended = [one.total_s < step.seconds for one, step in zip(first.updates, first.beside, strict=False)]
    late = len(first.beside) - sum(ended)
    return f"{late} updates did not end within their step." if late else "Every update ended within its step."


def _spread(steps: Sequence[Step]) -> Spread:
    return Spread.of([step.seconds for step in steps])


def _more(rank: Measured, of: Callable[[Step], float]) -> float:
    return Spread.of([of(b) - of(a) for a, b in zip(rank.idle, rank.beside, strict=True)]).median


def _title(name: str, first: Measured, run: Run) -> str:
    return (
        f"{name}, {first.num_params / 1e9:.2f} B parameters, {NUM_RANKS} ranks, engine with {NUM_WORKERS} workers, "
        f"verify {run.verify}, {run.device}: median (least-greatest)"
    )


def engine_section(name: str, run: Run, ranks: Sequence[Measured], load_s: float) -> Section:
    """Return how soon engines serve a step, beside the usual way, and what memory that takes."""
    first = ranks[0]
    updates = first.updates
    total = Spread.of([update.total_s for update in updates])
    gather, save = Spread.of(first.gather), Spread.of(first.save)
    usual_s = gather.median + save.median + load_s
    peak_bytes = max(_more(rank, lambda step: step.peak_bytes) for rank in ranks)
    rows = (
        ("Headrace: from the step's end to the engine serving it", total.ms()),
        ("of it copying out of the trainers' memory", Spread.of([update.read_s for update in updates]).ms()),
        ("of it the engine standing still", Spread.of([update.stall_s for update in updates]).ms()),
        ("the usual way: gathering everything, training stands", gather.ms()),
        ("the usual way: saving it", save.ms()),
        ("the usual way: the engine's own loader, the engine stands", f"{load_s * 1e3:.1f}"),
        ("the usual way, together", f"{usual_s * 1e3:.1f}"),
        ("segments of a rank, MB", f"{max(rank.segment_bytes for rank in ranks) / 1e6:.1f}"),
        ("peak memory of a rank beside an update over that of the step before, MB", f"{peak_bytes / 1e6:.1f}"),
        ("the rank's shard in bfloat16, MB", f"{max(rank.shard_bytes for rank in ranks) / 1e6:.1f}"),
    )
    notes = (f"{usual_s / total.median:.1f} times as fast; {len(updates)} updates.",)
    return Section(f"trainers-{name}-engine", _title(name, first, run), ("what", "ms"), rows, notes)


def sections(frameworks: Sequence[str], chosen: argparse.Namespace) -> list[Section]:
    """Measure everything."""
    found = []
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="headrace-", dir=chosen.scratch) as scratch:
        model = make_config(Path(scratch) / "model", chosen.layers)
        for name in frameworks:
            saved = "" if chosen.only_steps else str(Path(scratch) / f"{name}.safetensors")
            run, ranks = _measured(name, model, saved, chosen)
            if chosen.samples:
                ranks = _pooled(chosen.samples / f"{name}.json", ranks)
            found.append(step_section(name, run, ranks, chosen.engine_nice))
            if saved:
                found.append(engine_section(name, run, ranks, load_seconds(saved, chosen.layers)))
    return found


def _pooled(file: Path, ranks: list[Measured]) -> list[Measured]:
    """Return what was measured together with what earlier runs have left in `file`, and leave that there."""
    if file.exists():
        for rank, earlier in zip(ranks, msgspec.json.decode(file.read_bytes(), type=list[Measured]), strict=True):
            for one in ("without", "idle", "beside", "updates", "gather", "save", "copy"):
                getattr(rank, one).extend(getattr(earlier, one))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.encode(ranks))
    return ranks


def _measured(name: str, model: Path, saved: str, chosen: argparse.Namespace) -> tuple[Run, list[Measured]]:
    wait_for_quiet()
    options = ("--load-format", "dummy", "--dtype", "bfloat16", "--device", chosen.device)
    with EngineProcess(model, NUM_WORKERS, *options) as engine:
        pids = (engine.process.pid, *engine.worker_pids())
        _set_nice(pids, chosen.engine_nice)
        run = Run(
            framework=name,
            model=str(model),
            url=engine.url,
            engine_pids=pids,
            port=free_port(),
            pairs=chosen.pairs,
            rounds=chosen.rounds,
            device=chosen.device,
            verify=chosen.verify,
            saved=saved,
        )
        return run, run_ranks(measure, NUM_RANKS, RUN_S, run)


def _set_nice(pids: Sequence[int], nice: int) -> None:
    for pid in pids if nice else ():
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frameworks", nargs="*", default=["fsdp2", "zero3"], metavar="fsdp2|zero3")
    parser.add_argument("--pairs", type=int, default=4, help="Pairs of steps in a round.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=QWEN3_06B.layers)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--verify", choices=("none", "digest"), default="digest")
    parser.add_argument("--engine-nice", type=int, default=0, help="Niceness of the engine's processes.")
    parser.add_argument("--only-steps", action="store_true", help="Leave out the usual way.")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="Pool with earlier runs, whose samples are there.")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="Replace the tables between this page's markers.")
    parser.add_argument("--scratch", help="Folder for a few GB.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for section in sections(chosen.frameworks, chosen):
        report(section, chosen.write)
    machine().show(Console())


if __name__ == "__main__":
    main()
