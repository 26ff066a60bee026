"""What updates in the background cost training on GPUs, beside the copy alone and the links' ceiling of the same run.

Run as `python -m benchmarks.trainers_gpu` on a machine with one GPU or more; transformers has the model. FSDP2 trains
Qwen3-0.6B, masters in float32, on one GPU and on two; workers of an engine without a model loop lie on the same GPUs.
Windows of steps without a hook and with one that publishes as often as it can take turns; only their ends wait for the
GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import _gpu
from benchmarks._common import Section, Spread
from benchmarks._models import DENSE, qwen3_options
from benchmarks.all import report
from headrace.config import Deadlines, UpdateSettings
from headrace.store.live import LiveStore
from headrace.testing.bare_engine import BareEngine
from headrace.testing.engine_process import free_port
from headrace.testing.ranks import run_ranks
from headrace_trainers import fsdp
from headrace_trainers.hook import Hook
from headrace_trainers.settings import StepReport, Target

RANK_S = 110.0
WARM_UPS = 4
COPIES = 5
CEILING_BYTES = 1 << 30
TARGET_SHARE = 0.05
NOWHERE = "torch=http://127.0.0.1:1"
"""What ranks that publish nothing are attached to."""


@dataclass(frozen=True)
class Run:
    """What is to be measured: on `world_size` GPUs, windows of `steps` steps of `tokens` (rows, columns) per rank."""

    world_size: int
    steps: int
    windows: int
    tokens: tuple[int, int]
    layers: int
    device: str = "cuda"


@dataclass
class Measured:
    """One rank's measurements; seconds.

    Attributes:
        without: Per step of each window without a hook.
        beside: Per step of each window with updates beside it.
        updates: Updates that ended in each of the latter, on rank 0.
        held: Per step of each of the latter, held up by the fence.
        read: What an update took for copying out, training meanwhile.
        total: What an update took in all.
        alone: One copy of the rank's shard, with nothing beside it.
        link: Bytes per second out of the GPU into page-locked memory, in large copies, all ranks at once.
        shard_bytes: What one copy moves.
        extra_bytes: Peak of the GPU's memory in windows with updates over that in those without.
    """

    without: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    link: float = 0.0
    shard_bytes: int = 0
    extra_bytes: int = 0


def train(rank: int, run: Run, port: int, target: Target) -> Measured:
    """Be a rank: train with and without a hook in turns, then measure the copy alone and the link."""
    device = torch.device(run.device, rank) if run.device == "cuda" else torch.device("cpu")
    if run.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if run.device == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=run.world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        return _measure(run, device, target)
    finally:
        dist.destroy_process_group()


def _measure(run: Run, device: torch.device, target: Target) -> Measured:
    found, (step, model, optimizer) = Measured(), make_trainer(run, device)
    for _ in range(WARM_UPS):
        step()
    reports: list[StepReport] = []
    choices: dict[str, Any] = {"to": target, "dtype": "bfloat16", "report": reports.append}
    choices["update"] = UpdateSettings(verify="none", deadlines=Deadlines(ready_s=30))
    peaks: tuple[list[int], list[int]] = ([], [])
    for _ in range(run.windows):
        found.without.append(_window(step, run, device) / run.steps)
        peaks[0].append(_peak_bytes(device))
        with fsdp.attach(model, optimizer, **choices) as hook:
            hook.flush()  # makes and page-locks the segments
            step()
            hook.flush()
            reports.clear()
            held_s = hook.held_s
            _peak_bytes(device)
            found.beside.append(_window(step, run, device) / run.steps)
            peaks[1].append(_peak_bytes(device))
            found.held.append((hook.held_s - held_s) / run.steps)
            done = [one.update for one in reports if one.update]
            found.updates.append(len(done))
            found.read += [update.read_s for update in done]
            found.total += [update.total_s for update in done]
            _copy_alone(hook, found, device)
    found.extra_bytes = max(peaks[1]) - max(peaks[0])
    found.link = _link(device)
    return found


def make_trainer(run: Run, device: torch.device) -> tuple[Callable[[], None], Any, torch.optim.Optimizer]:
    """Return what takes a step, the model, and its optimizer."""
    torch.manual_seed(1)
    with device:
        config = AutoConfig.for_model("qwen3", **qwen3_options(run.layers))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    mesh = init_device_mesh(run.device, (run.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    tokens = torch.randint(3, 1000, run.tokens, device=device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model, optimizer


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _window(step: Callable[[], None], run: Run, device: torch.device) -> float:
    """Return how long a window's steps take."""
    dist.barrier()
    _synchronize(device)
    begin = time.monotonic()
    for _ in range(run.steps):
        step()
    _synchronize(device)
    return time.monotonic() - begin


def _peak_bytes(device: torch.device) -> int:
    """Return the most of the GPU's memory that was allocated since the last call."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def _copy_alone(hook: Hook, found: Measured, device: torch.device) -> None:
    """Copy the rank's shard out as an update does, with nothing beside it; all ranks at once."""
    hook.flush()
    source = hook._source
    store = LiveStore(source, "alone")
    rows = [i for i in range(len(source.regions())) if i not in source.aliases()]
    for version in range(1, 2 + COPIES):
        store.publish(version)
        _synchronize(device)
        dist.barrier()
        _synchronize(device)
        begin = time.monotonic()
        store.fill(version, hook.step, rows)
        if version > 1:
            found.alone.append(time.monotonic() - begin)
    found.shard_bytes = sum(store._layout.slots[row].num_bytes for row in rows) if store._layout else 0
    store.close()


def _link(device: torch.device) -> float:
    """Return bytes per second from this device into page-locked memory, all ranks at once."""
    there = torch.zeros(CEILING_BYTES, dtype=torch.uint8, device=device)
    here = torch.empty(CEILING_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    taken = []
    for number in range(2 + COPIES):
        dist.barrier()
        _synchronize(device)
        begin = time.monotonic()
        here.copy_(there, non_blocking=True)
        _synchronize(device)
        if number >= 2:
            taken.append(time.monotonic() - begin)
    return CEILING_BYTES / median(taken)


def follow(_rank: int, _world_size: int, rank: int, run: Run, port: int) -> Measured:
    """Be a rank other than 0, in a process of its own."""
    return train(rank, run, port, NOWHERE)


def measure(run: Run) -> list[Measured]:
    """Be rank 0, beside processes of the other ranks and of the engine's workers; return what each rank measured."""
    model, port = replace(DENSE, shape=replace(DENSE.shape, layers=run.layers)), free_port()  # type: ignore[type-var]
    with (
        tempfile.TemporaryDirectory() as cache,
        BareEngine(
            _gpu.gpu_worker if run.device == "cuda" else _cpu_worker,
            run.world_size,
            model,
            environment={"HEADRACE_RECIPE_CACHE": cache},
        ) as engine,
        ThreadPoolExecutor(max(1, run.world_size - 1)) as pool,
    ):
        others = [pool.submit(run_ranks, follow, 1, RANK_S, rank, run, port) for rank in range(1, run.world_size)]
        own = train(0, run, port, engine.control)
        return [own, *(other.result()[0] for other in others)]


def _cpu_worker(worker: Any, world_size: int, model: Any) -> Any:  # noqa: ANN401 - as `worker_backend`
    from benchmarks._models import worker_backend  # noqa: PLC0415

    return worker_backend(worker, world_size, model, 1 << 32)


def section(run: Run, ranks: Sequence[Measured]) -> Section:
    """Return the table of one run."""
    first = ranks[0]
    without, beside = Spread.of(first.without), Spread.of(first.beside)
    per_step = beside.median - without.median
    per_update = per_step * run.steps / max(1.0, median(first.updates))
    alone_s, link = max(Spread.of(rank.alone).median for rank in ranks), min(rank.link for rank in ranks)
    shard = max(rank.shard_bytes for rank in ranks)
    room_s = TARGET_SHARE * without.median + alone_s
    extra = max(rank.extra_bytes for rank in ranks)
    rows = (
        ("a step without a hook, ms", without.ms()),
        (f"a step with updates beside it, ms ({median(first.updates):.0f} updates in {run.steps} steps)", beside.ms()),
        ("added per step, ms", f"{per_step * 1e3:.2f} ({per_step / without.median:+.1%})"),
        ("added per update, ms", f"{per_update * 1e3:.2f}"),
        (f"to reach: {TARGET_SHARE:.0%} of a step and the copy, ms", f"{room_s * 1e3:.1f}"),
        ("of a step held up by the fence, ms", Spread.of(first.held).ms()),
        ("copying out beside training, ms", Spread.of(first.read).ms() if first.read else "no update ended"),
        ("copying out alone, ms", Spread.of(first.alone).ms()),
        ("the rank's shard in bfloat16, MB", f"{shard / 1e6:.1f}"),
        ("copying out alone, GB/s", f"{shard / alone_s / 1e9:.1f}"),
        ("the link, large copies, all ranks at once, GB/s", f"{link / 1e9:.1f}"),
        ("share of the link", f"{shard / alone_s / link:.0%}"),
        ("an update in all, ms", Spread.of(first.total).ms() if first.total else "no update ended"),
        ("peak of the GPU's memory with updates over that without, MB", f"{extra / 1e6:.1f}"),
    )
    name = torch.cuda.get_device_name() if run.device == "cuda" else "cpu"
    title = (
        f"FSDP2, Qwen3-0.6B, {run.layers} layers, {run.tokens[0]}x{run.tokens[1]} tokens per rank, "
        f"{run.world_size}x {name}, torch {torch.__version__}, verify none: median (least-greatest)"
    )
    return Section(f"trainers-gpu-{run.world_size}", title, ("what", "value"), rows)


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], metavar="N", help="as far as they are there")
    parser.add_argument("--steps", type=int, default=20, help="steps of a window")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs=2, default=[4, 1024], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--layers", type=int, default=int(str(qwen3_options()["num_hidden_layers"])))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the benchmark itself")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables between this page's markers")
    chosen = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    there = torch.cuda.device_count() if chosen.device == "cuda" else max(chosen.gpus)
    if not there:
        raise SystemExit("no GPU: torch sees none; this benchmark needs at least one")
    sizes = [number for number in chosen.gpus if number <= there]
    if len(sizes) > 1:  # hooks of all ranks are counted from the process's beginning
        for number in sizes:
            command = [sys.executable, "-m", "benchmarks.trainers_gpu", *sys.argv[1:], "--gpus", str(number)]
            subprocess.run(command, check=True)
        return
    tokens = (chosen.tokens[0], chosen.tokens[1])
    run = Run(sizes[0], chosen.steps, chosen.windows, tokens, chosen.layers, chosen.device)
    made = section(run, measure(run))
    report(made, chosen.write)
    Console(width=200).print(made.markdown(), markup=False)


if __name__ == "__main__":
    main()
