"""Updates of a real vLLM on GPUs that answers eight streams, beside vLLM's own ways to load and checkpoint-engine.

`python -m benchmarks.vllm_gpu dense --tp 2`; needs a vLLM for CUDA and headrace-vllm installed beside it. The engine is
a process of its own, the updater another; weights are places in a pool of random bytes, as in `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks import _gpu, _peer
from benchmarks._common import Section, Spread, by_track
from benchmarks._models import SERVED, Model
from benchmarks._vllm_engine import RemoteEngine, longest_gap
from headrace.errors import HeadraceError
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer

COLUMNS = (
    "way", "commit ms", "of the link", "stall ms", "total ms", "longest gap ms", "gap while staging ms", "barrier",
)  # fmt: skip
WARM_UPS = 1
QUIET_S = 1.2
GRAPHS = {
    "compilation_config": {
        "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    },
}  # fmt: skip
EXTENSION = "benchmarks._vllm_worker.BenchExtension"


@dataclass(frozen=True)
class Way:
    """How a series of updates is made."""

    name: str
    budget_bytes: int | None
    choices: dict[str, Any] = field(default_factory=dict)


WAYS = (
    Way("straight from host memory", 0),
    Way("staged", None),
    Way("staged, caches kept, paused", None, {"cache": "keep", "barrier": "pause"}),
    Way("staged, caches kept, held", None, {"cache": "keep", "barrier": "hold"}),
)


class Bench:
    """One engine and one source over all series."""

    def __init__(self, model: Model, engine: RemoteEngine, repeats: int) -> None:
        self._engine = engine
        self._source = _gpu.PoolSource(model, finite=True)
        self._server = ParameterServer(source=self._source)
        self._repeats = repeats
        self._windows: list[tuple[str, UpdateReport, float, float, float]] = []

    def update(self, name: str, **choices: Any) -> UpdateReport:  # noqa: ANN401 - fields of UpdateSettings
        """Update once, and note when it was and when the pause began."""
        self._source.version += 1
        marks: dict[str, float] = {}
        time.sleep(QUIET_S)
        begin = time.monotonic()
        report = self._server.update(
            self._engine,
            verify=choices.pop("verify", "none"),
            progress=lambda what, *_: marks.setdefault(what, time.monotonic()),
            **choices,
        )
        self._windows.append((name, report, begin, marks["commit"], time.monotonic()))
        print(
            f"  {name}: commit {_commit(report) * 1e3:.1f} stall {report.stall_s * 1e3:.1f} "
            f"total {report.total_s * 1e3:.0f} ms, {report.workers[0].ring[:60]}",
            flush=True,
        )
        return report

    def series(self, ways: Sequence[Way]) -> None:
        """Make all series of updates.

        The very first goes through the engine's loader and proves the recipe; it and the next one, into the other set
        of segments, page-lock the holder's memory while the engine serves.
        """
        self.update("first: loader and proof")
        self.update("second: page-locks the other segments")
        for way in ways:
            try:
                for turn in range(WARM_UPS + self._repeats):
                    name = way.name if turn >= WARM_UPS else f"warm-up {turn + 1} of {way.name}"
                    self.update(name, budget_bytes=way.budget_bytes, **way.choices)
            except HeadraceError as error:
                print(f"  {way.name}: {error}", flush=True)
        self.update("every byte compared", budget_bytes=None, verify="full")

    def rows(self, times: Sequence[Sequence[float]], link: float) -> list[tuple[str, ...]]:
        """Return a row per series: medians (least-most)."""
        names = list(dict.fromkeys(name for name, *_ in self._windows))
        return [self._row(name, times, link) for name in names]

    def _row(self, name: str, times: Sequence[Sequence[float]], link: float) -> tuple[str, ...]:
        found = [window for window in self._windows if window[0] == name]
        commits = Spread.of([_commit(report) for _, report, *_ in found])
        each = max(worker.live_bytes for worker in found[0][1].workers)
        barrier = getattr(found[-1][1].engines[0], "barrier", "pause")
        return (
            name,
            commits.ms(),
            f"{each / commits.median / link:.1%}",
            Spread.of([report.stall_s for _, report, *_ in found]).ms(),
            Spread.of([report.total_s for _, report, *_ in found]).ms(),
            Spread.of([longest_gap(times, begin, end) for *_, begin, _, end in found]).ms(),
            Spread.of([longest_gap(times, begin, pause) for *_, begin, pause, _ in found]).ms(),
            str(barrier),
        )

    def usual_gap(self, times: Sequence[Sequence[float]]) -> Spread:
        """Return the longest gaps of the quiet times before each update."""
        quiet = [longest_gap(times, begin - QUIET_S + 0.5, begin - 0.1) for *_, begin, _, _ in self._windows]
        return Spread.of([gap for gap in quiet if not isnan(gap)])

    def close(self) -> None:
        self._server.close()


def _commit(report: UpdateReport) -> float:
    tracks = by_track(report.spans)
    return max(
        span.duration_s for name in tracks if name.startswith("receiver") for span in tracks[name]
        if span.name == "commit"
    )  # fmt: skip


def baselines(engine: RemoteEngine, model: Model, tp: int, repeats: int) -> list[tuple[str, str]]:
    """Measure vLLM's own ways inside the workers, and checkpoint-engine's whole update."""
    found = []
    told = (next(name for name, served in SERVED.items() if served is model),)
    for way in ("load_weights", "layerwise"):
        seconds = [max(engine.engine.rpc(f"bench_pool_{way}", told)) for _ in range(1 + repeats)]
        found.append((f"vLLM's {way}, from pinned memory", Spread.of(seconds[1:]).ms()))
        print("  ".join(found[-1]), flush=True)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        engine.pause("recompute", 60.0)
        engine.resume(60.0)
        seconds.append(time.perf_counter() - begin)
    found.append(("empty pause and resume, idle", Spread.of(seconds).ms()))
    if _peer.is_installed():
        with _peer.Peer(model, tp, 7) as peer, _gpu.MemoryWatch() as memory:
            pairs = [
                peer.update(lambda handles: engine.engine.rpc("update_weights_from_ipc", (handles,)))
                for _ in range(1 + repeats)
            ]
        found += [
            ("checkpoint-engine's gather_metas", Spread.of([gather for gather, _ in pairs[1:]]).ms()),
            ("checkpoint-engine's update", Spread.of([update for _, update in pairs[1:]]).ms()),
            ("checkpoint-engine's GPU memory, MiB", f"{memory.most_bytes / (1 << 20):,.0f}"),
        ]
    return found


def write_config(model: Model, folder: Path) -> Path:
    """Write what vLLM must know of a model whose weights it makes up."""
    from transformers import Qwen3Config, Qwen3MoeConfig  # noqa: PLC0415 - heavy

    shape = model.shape
    assert shape is not None
    common = {
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "head_dim": shape.head_dim,
        "num_key_value_heads": shape.kv_heads, "tie_word_embeddings": False, "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }  # fmt: skip
    experts = {
        "num_experts": shape.experts, "num_experts_per_tok": 8, "moe_intermediate_size": shape.expert_intermediate,
        "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True,
    }  # fmt: skip
    config = (
        Qwen3MoeConfig(**common, **experts)
        if shape.experts
        else Qwen3Config(**common, architectures=["Qwen3ForCausalLM"])
    )
    config.save_pretrained(folder)
    return folder


def measure(
    name: str, tp: int, staging_gib: float, repeats: int, folder: Path, *, graphs: bool
) -> list[Section]:
    """Run one engine through all series and baselines."""
    model = SERVED[name]
    options = {
        "model": str(write_config(model, folder / name)), "load_format": "dummy", "skip_tokenizer_init": True,
        "enforce_eager": not graphs, "gpu_memory_utilization": 0.6, "max_model_len": 2048, "dtype": "bfloat16",
        "tensor_parallel_size": tp, "weight_transfer_config": {"backend": "headrace"},
        "worker_extension_cls": EXTENSION, "disable_custom_all_reduce": True, "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
    } | (GRAPHS if graphs else {})  # fmt: skip
    environment = {"HEADRACE_STAGING_GIB": str(staging_gib), "VLLM_LOGGING_LEVEL": "INFO"}
    begin = time.monotonic()
    with RemoteEngine(options, environment, folder / "engine.log") as engine:
        print(f"{model.name} TP{tp}: started in {time.monotonic() - begin:.0f} s", flush=True)
        link = min(_rpc_numbers(engine, "bench_host_to_device"))
        inside = min(_rpc_numbers(engine, "bench_device_to_device"))
        bench = Bench(model, engine, repeats)
        with closing(bench):
            engine.engine.start_streams()
            try:
                bench.series(WAYS)
            except HeadraceError:
                print((folder / "engine.log").read_text()[-5000:], flush=True)
                raise
            time.sleep(QUIET_S)
            times = engine.engine.stop_streams()
            rows = bench.rows(times, link)
            usual = bench.usual_gap(times)
        for row in rows:
            print("  ".join(row), flush=True)
        print(f"usual gap {usual.ms()}", flush=True)
        others = baselines(engine, model, tp, repeats)
    rates = [len(stream) / (stream[-1] - stream[0]) for stream in times if len(stream) > 1]
    notes = (
        f"PCIe, all workers at once, slowest: {link / 1e9:.1f} GB/s; a copy inside a GPU {inside / 1e9:.0f} GB/s.",
        f"Longest gap between two tokens of one stream in {QUIET_S - 0.6:.1f} s without an update: {usual.ms()} ms; "
        f"{median(rates):.0f} tokens per second and stream over the whole run.",
    )
    gpu = torch.cuda.get_device_name()
    mode = "CUDA graphs" if graphs else "eager"
    title = f"{model.name}, TP{tp}, vLLM ({mode}) under 8 streams, {tp}x {gpu}: ms, median (least-greatest)"
    return [
        Section(f"vllm-gpu-{name}-tp{tp}", title, COLUMNS, tuple(rows), notes),
        Section(f"vllm-gpu-{name}-tp{tp}-others", "beside it, idle", ("way", "ms"), tuple(others)),
    ]


def _rpc_numbers(engine: RemoteEngine, method: str) -> list[float]:
    return [float(one) for one in engine.engine.rpc(method)]


def main() -> None:
    """Print the tables; JSON lines too with `--json FILE`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=tuple(SERVED))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--staging-gib", type=float, default=0.0, help="GPU memory of a worker for staging")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--graphs", action="store_true", help="decode with CUDA graphs, not eagerly")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    staging = chosen.staging_gib or 18.0 / chosen.tp
    with tempfile.TemporaryDirectory() as made:
        sections = measure(chosen.model, chosen.tp, staging, chosen.repeats, Path(made), graphs=chosen.graphs)
    for section in sections:
        section.show(Console(width=220))
        Console(width=220).print(section.markdown(), markup=False)
    if chosen.json:
        chosen.json.write_text(json.dumps([vars(section) for section in sections]))


if __name__ == "__main__":
    main()
