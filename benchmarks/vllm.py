"""Updates of a real vLLM beside vLLM's own ways to load, in one run, and what staging costs other requests.

Run in an environment with vLLM: `nox -s vllm_benchmarks`, or `python -m benchmarks.vllm`. Weights keep the loader's
layout, as on CUDA; every engine is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from safetensors import safe_open

from benchmarks._common import Section
from headrace.protocols import EngineControl
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer
from headrace.testing.tiny_model import TinySize, make_tiny_qwen3, make_tiny_qwen3_moe

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "packages" / "vllm-adapter" / "tests" / "support"
DENSE = TinySize(num_layers=24, hidden=1024, intermediate=4096, num_heads=16, num_kv_heads=8, head_dim=64)
MOE = TinySize(
    num_layers=24, hidden=512, intermediate=160, num_heads=8, num_kv_heads=4, head_dim=64, num_experts=64
)
BIG = TinySize(num_layers=32, hidden=2048, intermediate=8192, num_heads=32, num_kv_heads=8, head_dim=64)
MAKERS = {
    "dense": (make_tiny_qwen3, DENSE),
    "mixture": (make_tiny_qwen3_moe, MOE),
    "big": (make_tiny_qwen3, BIG),
}
QUIET = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore",
}  # fmt: skip
COLUMNS = (
    "model", "TP", "tensors", "GB", "copy ms", "commit ms", "commit/copy", "stall ms", "empty pause ms",
    "total ms", "load_weights ms", "/commit", "layerwise ms", "/commit",
)  # fmt: skip
STEPS = ("pause", "prepare", "commit", "finish", "resume")
REPEATS = 5


def make(name: str, folder: Path) -> list[Path]:
    """Write two versions of a model in bfloat16."""
    maker, size = MAKERS[name]
    return [maker(folder / f"{name}-{seed}", seed, dtype="bfloat16", size=size) for seed in (1, 2)]


def measure(name: str, tp: int, folder: Path) -> dict[str, Any]:
    """Run one engine in a process of its own and return its numbers."""
    out = folder / "out.json"
    path = os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "benchmarks.vllm",
        "--engine",
        name,
        "--tp",
        str(tp),
        "--folder",
        str(folder),
    ]
    subprocess.run(
        command, env=os.environ | QUIET | {"PYTHONPATH": path}, check=True, stdout=subprocess.DEVNULL
    )
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def run_engine(name: str, tp: int, folder: Path) -> dict[str, Any]:
    """Be the engine: update again and again, and let vLLM load by itself between the updates."""
    from vllm import LLM  # noqa: PLC0415 - only the engine's own process has it

    import headrace_vllm  # noqa: PLC0415

    paths = [folder / f"{name}-{seed}" for seed in (1, 2)]
    llm = LLM(
        str(paths[0]), enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=512, dtype="bfloat16",
        tensor_parallel_size=tp, weight_transfer_config={"backend": "headrace"},
        worker_extension_cls="benchmarks._vllm_worker.BenchExtension",
    )  # fmt: skip
    control = headrace_vllm.attach(llm)
    rows: list[dict[str, float]] = []
    with ParameterServer(paths[1]) as server:
        for turn in range(REPEATS + 2):
            report = server.update(control, verify="none")
            row = {"commit": commit_of(report), "stall": report.stall_s, "total": report.total_s} | pause_of(report)
            row |= {"copy": max(llm.collective_rpc("bench_memcpy")), "empty": empty_pause(control)}
            if turn in (2, 3, 4):
                row |= {
                    what: max(llm.collective_rpc(f"bench_{what}", args=(str(paths[0]),)))
                    for what in ("load_weights", "layerwise")
                }
            rows.append(row)
        opaque = len(report.workers[0].opaque_names)
    keys = {key for row in rows for key in row}
    numbers: dict[str, Any] = {key: median(row[key] for row in rows[2:] if key in row) for key in keys}
    return numbers | {"bytes": report.live_bytes, "opaque": opaque}


def commit_of(report: UpdateReport) -> float:
    """Return the slowest worker's commit."""
    return max(
        span.duration_s
        for span in report.spans
        if span.name == "commit" and span.track.startswith("receiver")
    )


def pause_of(report: UpdateReport) -> dict[str, float]:
    """Return the seconds of each step of the pause, as the updater saw them; `write` and `check` are the workers'."""
    found = dict.fromkeys((*STEPS, "write", "check"), 0.0)
    for span in report.spans:
        if span.track == "updater" and span.name in STEPS:
            found[span.name] += span.duration_s
    for track in {span.track for span in report.spans if span.track.startswith("receiver")}:
        own = [span for span in report.spans if span.track == track]
        for what, name in (("write", "copy"), ("check", "verify")):
            found[what] = max(found[what], sum(span.duration_s for span in own if span.name == name))
    return {f"{name} step": seconds for name, seconds in found.items()}


def empty_pause(control: EngineControl) -> float:
    """Return the seconds of a pause and resume with nothing between."""
    begin = time.perf_counter()
    control.pause("recompute", 30.0)
    control.resume(30.0)
    return time.perf_counter() - begin


def throughput(folder: Path, paths: list[Path]) -> Section:
    """Measure tokens per second of other requests before the command, and from the command to the pause."""
    sys.path.insert(0, str(SUPPORT))
    from vllm_server import VllmServer  # noqa: PLC0415 - the tests' own support

    options = ("--dtype", "bfloat16", "--max-num-seqs", "8")
    with VllmServer(paths[0], *options, log=folder / "vllm.log", unpacked=True) as server:
        stop = threading.Event()
        clients = [threading.Thread(target=_ask, args=(server, stop, n), daemon=True) for n in range(4)]
        for client in clients:
            client.start()
        samples: list[tuple[float, float]] = []
        sampler = threading.Thread(target=_sample, args=(server, stop, samples), daemon=True)
        sampler.start()
        with ParameterServer(paths[1]) as first:
            first.update(server.target)
        time.sleep(12)
        before = _rate(samples, time.monotonic() - 10, time.monotonic())
        begin, marks = time.monotonic(), {}
        with ParameterServer(paths[0]) as source:
            report = source.update(
                server.target, progress=lambda what, *_: marks.setdefault(what, time.monotonic())
            )
        time.sleep(3)
        stop.set()
        for client in clients:
            client.join(60)
    window = (begin, marks["commit"])
    rate, gb = _rate(samples, *window), report.live_bytes / 1e9
    phases = ", ".join(
        f"{what} {_rate(samples, at, end):.0f} for {end - at:.1f} s"
        for what, at, end in _phases(marks)
        if end - at > 0.5
    )
    row = (
        f"{gb:.1f}",
        f"{window[1] - window[0]:.1f}",
        f"{before:.0f}",
        f"{rate:.0f}",
        f"{1 - rate / before:.0%}",
        f"{report.stall_s * 1e3:.0f}",
    )
    notes = (
        f"Tokens per second in each phase longer than 0.5 s: {phases}. To reach: a loss of at most 35 % on two cores.",
        f"The stall: {_steps(pause_of(report))}.",
    )
    columns = ("GB", "window s", "tokens/s before", "tokens/s in the window", "loss", "stall ms")
    return Section(
        "vllm-staging",
        "what an update costs other requests, from the command to the pause",
        columns,
        (row,),
        notes,
    )


def _steps(found: dict[str, Any]) -> str:
    named = {key.removesuffix(" step"): value for key, value in found.items() if key.endswith(" step")}
    return ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in named.items()) + " ms"


def _ask(server: Any, stop: threading.Event, number: int) -> None:  # noqa: ANN401 - a VllmServer
    while not stop.is_set():
        server.generate([10 + number, 11, 12, 13], 64, logprobs=None)


def _sample(server: Any, stop: threading.Event, samples: list[tuple[float, float]]) -> None:  # noqa: ANN401
    while not stop.is_set():
        lines = server.client.get("/metrics").text.splitlines()
        total = sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("vllm:generation_tokens_total")
        )
        samples.append((time.monotonic(), total))
        time.sleep(0.1)


def _rate(samples: list[tuple[float, float]], begin: float, end: float) -> float:
    inside = [sample for sample in samples if begin <= sample[0] <= end]
    if len(inside) < 2:
        return 0.0
    return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def _phases(marks: dict[str, float]) -> list[tuple[str, float, float]]:
    order = sorted(marks.items(), key=lambda mark: mark[1])
    return [(what, at, order[i + 1][1]) for i, (what, at) in enumerate(order[:-1])]


def loading(folder: Path, sizes: list[int]) -> Section:
    """Measure updates beside vLLM's own ways to load."""
    rows, steps = [], []
    for name in ("dense", "mixture"):
        paths = make(name, folder)
        tensors = _num_tensors(paths[0])
        for tp in sizes:
            found = measure(name, tp, folder)
            rows.append(_row(name, tp, tensors, found))
            steps.append(f"The stall, {name} TP{tp}: {_steps(found)}.")
    notes = (
        "Commit, stall and total are Headrace's, verify none; copy is one plain copy of a worker's parameters.",
        "To reach: commit/copy at most 1.3; stall at most commit + empty pause + 20 ms; load_weights/commit at least "
        "2.5 for the mixture; layerwise/commit at least 10 for the mixture, 2.5 for the dense model.",
        *steps,
    )
    return Section("vllm", "vLLM 0.32 on a CPU: medians", COLUMNS, tuple(rows), notes)


def _row(name: str, tp: int, tensors: int, found: dict[str, Any]) -> tuple[str, ...]:
    ms = {key: f"{value * 1e3:.1f}" for key, value in found.items() if isinstance(value, float)}
    over = {key: f"{found[key] / found['commit']:.1f}" for key in ("load_weights", "layerwise")}
    return (
        name, str(tp), f"{tensors:,}", f"{found['bytes'] / 1e9:.2f}", ms["copy"], ms["commit"],
        f"{found['commit'] / found['copy']:.2f}", ms["stall"], ms["empty"], ms["total"],
        ms["load_weights"], over["load_weights"], ms["layerwise"], over["layerwise"],
    )  # fmt: skip


def _num_tensors(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += len(list(file.keys()))
    return total


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--tp", type=int, default=0, help="only this many workers")
    parser.add_argument("--folder", type=Path, help="where models are made and kept")
    parser.add_argument("--only", choices=("loading", "throughput"))
    chosen = parser.parse_args()
    if chosen.engine:
        found = run_engine(chosen.engine, chosen.tp, chosen.folder)
        (chosen.folder / "out.json").write_text(json.dumps(found))
        os._exit(0)
    with tempfile.TemporaryDirectory() as made:
        folder = chosen.folder or Path(made)
        if chosen.only != "throughput":
            loading(folder, [chosen.tp] if chosen.tp else [1, 2]).show(Console(width=200))
        if chosen.only != "loading":
            throughput(folder, make("big", folder)).show(Console(width=160))


if __name__ == "__main__":
    main()
