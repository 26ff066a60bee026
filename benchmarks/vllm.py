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
from contextlib import suppress
from dataclasses import astuple, dataclass
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
BIG = TinySize(num_layers=16, hidden=2048, intermediate=8192, num_heads=32, num_kv_heads=8, head_dim=64)
MAKERS = {
    "dense": (make_tiny_qwen3, DENSE, "bfloat16"),
    "mixture": (make_tiny_qwen3_moe, MOE, "bfloat16"),
    # Without AVX-512, processors multiply bfloat16 so slowly that an engine is not held up by memory.
    "big": (make_tiny_qwen3, BIG, "float32"),
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
WINDOWS = 4
BEFORE_S = 15.0
SETTLE_S = 10.0  # After an update the first step computes all requests' KV again.


def make(name: str, folder: Path) -> list[Path]:
    """Write two versions of a model."""
    maker, size, dtype = MAKERS[name]
    return [maker(folder / f"{name}-{seed}", seed, dtype=dtype, size=size) for seed in (1, 2)]


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
            row = {"commit": commit_of(report), "stall": report.stall_s, "total": report.total_s}
            row |= pause_of(report)
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

    with VllmServer(paths[0], "--max-num-seqs", "8", log=folder / "vllm.log", unpacked=True) as server:
        stop = threading.Event()
        clients = [threading.Thread(target=_ask, args=(server, stop, n), daemon=True) for n in range(4)]
        for client in clients:
            client.start()
        with ParameterServer(paths[1]) as first:
            first.update(server.target)
        meter = Meter(server)
        sampler = threading.Thread(target=meter.run, args=(stop,), daemon=True)
        sampler.start()
        windows = [_window(server, meter, paths[n % 2]) for n in range(WINDOWS)]
        stop.set()
        for client in clients:
            client.join(60)
    return Section(
        "vllm-staging",
        "what an update costs other requests, from the command to the pause",
        ("GB", "window s", "tokens/s before", "in the window", "loss", "by waiting for a core", "stall ms"),
        tuple(window.row() for window in windows),
        (
            f"Mean loss: {1 - sum(w.kept for w in windows) / len(windows):.0%}. To reach: 35 % on two cores.",
            *(f"Window {n}: {window.note()}." for n, window in enumerate(windows, 1)),
        ),
    )


@dataclass(frozen=True)
class Reading:
    """The engine at a moment: tokens made, seconds that its thread computed, and that it waited for a core."""

    at_s: float
    tokens: float
    computing_s: float
    waiting_s: float

    def towards(self, end: Reading, at_s: float) -> Reading:
        """Return what lies between, as if all grew evenly."""
        share = (at_s - self.at_s) / (end.at_s - self.at_s)
        return Reading(*(a + share * (b - a) for a, b in zip(astuple(self), astuple(end), strict=True)))

    def until(self, end: Reading) -> Reading:
        """Return the change, per second."""
        seconds = end.at_s - self.at_s
        return Reading(*((b - a) / seconds for a, b in zip(astuple(self), astuple(end), strict=True)))


class Meter:
    """Reads what a server's engine does, several times per step."""

    def __init__(self, server: Any) -> None:  # noqa: ANN401 - a VllmServer
        self._server = server
        self._thread = _busiest_thread(server.process.pid)
        self._steps: list[Reading] = [self._read()]

    def run(self, stop: threading.Event) -> None:
        """Note when tokens come, until told to stop."""
        while not stop.wait(0.1):
            found = self._read()
            if found.tokens > self._steps[-1].tokens:
                self._steps.append(found)

    def between(self, begin: float, end: float) -> Reading:
        """Return the mean change per second; a step that is cut counts for its share."""
        return self._at(begin).until(self._at(end))

    def wait_past(self, at_s: float) -> None:
        """Wait for a step that ends after a moment."""
        while self._steps[-1].at_s < at_s:
            time.sleep(0.1)

    def _at(self, at_s: float) -> Reading:
        later = next(n for n, step in enumerate(self._steps) if step.at_s >= at_s)
        return self._steps[later - 1].towards(self._steps[later], at_s)

    def _read(self) -> Reading:
        lines = self._server.client.get("/metrics").text.splitlines()
        total = sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("vllm:generation_tokens_total")
        )
        computing, waiting = _scheduled(self._thread)
        return Reading(time.monotonic(), total, computing, waiting)


def _scheduled(thread: Path) -> tuple[float, float]:
    """Return the seconds that a thread had a core, and that it wanted one and had none."""
    computing, waiting, _ = (thread / "schedstat").read_text().split()
    return int(computing) / 1e9, int(waiting) / 1e9


def _busiest_thread(group: int) -> Path:
    """Return the thread of a process group that has computed most: the engine's."""
    threads = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[2]) == group:
                threads += stat.parent.glob("task/*")
    return max(threads, key=lambda thread: _scheduled(thread)[0])


@dataclass(frozen=True)
class Window:
    """One update under load."""

    report: UpdateReport
    seconds: float
    before: Reading
    inside: Reading
    phases: str

    @property
    def kept(self) -> float:
        """The share of tokens per second that was left."""
        return self.inside.tokens / self.before.tokens

    def row(self) -> tuple[str, ...]:
        """Return it as a row of the table."""
        waiting = self.inside.waiting_s - self.before.waiting_s
        return (
            f"{self.report.live_bytes / 1e9:.1f}", f"{self.seconds:.1f}", f"{self.before.tokens:.1f}",
            f"{self.inside.tokens:.1f}", f"{1 - self.kept:.0%}", f"{waiting:.0%}", f"{self.report.stall_s * 1e3:.0f}",
        )  # fmt: skip

    def note(self) -> str:
        """Say what the engine's thread did, and when."""
        speed = (self.inside.tokens / self.inside.computing_s) / (
            self.before.tokens / self.before.computing_s
        )
        return (
            f"the engine's thread computed {self.before.computing_s:.0%} of the time before and "
            f"{self.inside.computing_s:.0%} in the window, at {speed:.0%} of its speed; "
            f"tokens per second: {self.phases}; the stall: {_steps(pause_of(self.report))}"
        )


def _window(server: Any, meter: Meter, path: Path) -> Window:  # noqa: ANN401 - a VllmServer
    time.sleep(BEFORE_S + SETTLE_S)
    begin, marks = time.monotonic(), {}
    with ParameterServer(path) as source:
        report = source.update(
            server.target, progress=lambda what, *_: marks.setdefault(what, time.monotonic())
        )
    end = marks["commit"]
    meter.wait_past(end)
    phases = ", ".join(
        f"{what} {meter.between(at, end).tokens:.1f} for {end - at:.1f} s"
        for what, at, end in _phases(marks)
        if end - at > 0.5
    )
    before = meter.between(begin - BEFORE_S, begin)
    return Window(report, end - begin, before, meter.between(begin, end), phases)


def _steps(found: dict[str, Any]) -> str:
    named = {key.removesuffix(" step"): value for key, value in found.items() if key.endswith(" step")}
    return ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in named.items()) + " ms"


def _ask(server: Any, stop: threading.Event, number: int) -> None:  # noqa: ANN401 - a VllmServer
    while not stop.is_set():
        server.generate([10 + number, 11, 12, 13], 16, logprobs=None)


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
            print("  ".join(rows[-1]), flush=True)
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
