"""Updates of a real SGLang server beside SGLang's own ways to take weights, in one run on the same models.

Run by `nox -s sglang_benchmarks`, or by `python -m benchmarks.sglang` where SGLang is and the tests' support is on the
path. All ways pause as Headrace does, and their stall is the time from the pause to the end of its resumption.
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from benchmarks._common import Section, Spread, commit_seconds, progress, wait_for_quiet
from benchmarks.vllm import MAKERS, empty_pause, make
from headrace.ceiling import measure_copy_ceiling
from headrace.registry import engine_control
from headrace.server.parameter_server import ParameterServer

SUPPORT = Path(__file__).parents[1] / "packages" / "sglang-adapter" / "tests" / "support"
COLUMNS = (
    "model", "TP", "GB", "way", "stall ms", "total ms", "memory GB", "commit ms", "copy ms", "commit/copy",
    "empty pause ms",
)  # fmt: skip
SAMPLE_S = 0.01
Row = dict[str, float]


class Watch:
    """The least memory that was available on this machine while it looked, below what there was when it was made."""

    def __init__(self) -> None:
        self._before = _available_bytes()

    @contextmanager
    def looking(self, row: Row) -> Iterator[None]:
        """Look while the body runs, and write what it needed at most into `row`."""
        least, stop = [self._before], threading.Event()

        def look() -> None:
            while not stop.wait(SAMPLE_S):
                least[0] = min(least[0], _available_bytes())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            row["memory"] = (self._before - least[0]) / 1e9


def measure(server: Any, paths: list[Path], tp: int, repeats: int) -> dict[str, Row]:  # noqa: ANN401
    """Update by each way in turn, again and again, and return the medians of each way."""
    ways = {"disk": from_disk, "tensor": from_tensor}
    rows: dict[str, list[Row]] = {name: [] for name in ("headrace", *ways)}
    watches: dict[str, Watch] = {}
    with progress("updates", (repeats + 1) * len(rows)) as step:
        for name, way in ways.items():
            watches[name] = Watch()
            for turn in range(repeats + 1):
                rows[name].append(_timed(watches[name], way, server, paths[turn % 2], tp))
                step(name)
        watches["headrace"] = Watch()
        with ParameterServer(paths[1]) as source:
            for _ in range(repeats + 1):
                rows["headrace"].append(_timed(watches["headrace"], headrace, server, source, tp))
                step("headrace")
            most_bytes = int(rows["headrace"][-1]["most"])
    found = {name: _medians(made[1:]) for name, made in rows.items()}
    ceiling = measure_copy_ceiling(tp, most_bytes)
    return found | {"ceiling": {"copy": Spread.of(ceiling.rounds_s).median}}


def headrace(server: Any, source: ParameterServer, _tp: int) -> Row:  # noqa: ANN401
    """Update by Headrace, and pause once with nothing to do."""
    report = source.update(server.target, verify="none")
    control = engine_control(server.target)
    empty = empty_pause(control)
    control.close()
    return {
        "stall": report.stall_s, "total": report.total_s, "commit": commit_seconds(report), "empty": empty,
        "bytes": float(report.live_bytes), "most": float(max(worker.live_bytes for worker in report.workers)),
    }  # fmt: skip


def from_disk(server: Any, path: Path, _tp: int) -> Row:  # noqa: ANN401
    """Update by SGLang's `/update_weights_from_disk`."""
    body = {"model_path": str(path), "flush_cache": True}
    begin = time.perf_counter()
    stall = _paused(server, lambda: _post(server, "/update_weights_from_disk", body))
    return {"stall": stall, "total": time.perf_counter() - begin}


def from_tensor(server: Any, path: Path, tp: int) -> Row:  # noqa: ANN401
    """Update by SGLang's `/update_weights_from_tensor` with one flattened bucket, from tensors of this process."""
    from sglang.srt.utils import MultiprocessingSerializer  # noqa: PLC0415 - only an environment with SGLang has it
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket  # noqa: PLC0415

    tensors = [pair for file in sorted(path.glob("*.safetensors")) for pair in load_file(file).items()]
    begin = time.perf_counter()
    bucket = FlattenedTensorBucket(named_tensors=tensors)
    shared = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.metadata}
    payload = [base64.b64encode(MultiprocessingSerializer.serialize(shared)).decode() for _ in range(tp)]
    body = {"serialized_named_tensors": payload, "load_format": "flattened_bucket", "flush_cache": True}

    def load() -> None:
        _post(server, "/begin_weight_update", {})
        _post(server, "/update_weights_from_tensor", body)
        _post(server, "/end_weight_update", {})

    stall = _paused(server, load)
    return {"stall": stall, "total": time.perf_counter() - begin}


def _paused(server: Any, load: Callable[[], object]) -> float:  # noqa: ANN401
    begin = time.perf_counter()
    _post(server, "/pause_generation", {"mode": "retract"})
    load()
    _post(server, "/continue_generation", {"torch_empty_cache": False})
    return time.perf_counter() - begin


def _post(server: Any, path: str, body: dict[str, Any]) -> None:  # noqa: ANN401
    answer = server.client.post(path, json=body, timeout=300)
    if not answer.is_success:
        message = f"{path} answered HTTP {answer.status_code}: {answer.text[:500]}"
        raise RuntimeError(message)


def _timed(watch: Watch, way: Callable[..., Row], server: Any, source: object, tp: int) -> Row:  # noqa: ANN401
    row: Row = {}
    with watch.looking(row):
        row |= way(server, source, tp)
    return row


def _medians(rows: list[Row]) -> Row:
    return {key: (max if key == "memory" else median)(row[key] for row in rows) for key in rows[0]}


def _available_bytes() -> int:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))


def section(folder: Path, names: list[str], sizes: list[int], repeats: int) -> Section:
    """Run a server per model and number of schedulers, and return the table."""
    sys.path[:0] = [str(SUPPORT)]
    from sglang_server import SglangServer  # noqa: PLC0415 - the tests' own support

    rows = []
    for name in names:
        paths = make(name, folder)
        for tp in sizes:
            options = ("--dtype", "bfloat16", "--tp-size", str(tp))
            with SglangServer(paths[0], *options, log=folder / "sglang.log", workers=tp) as server:
                wait_for_quiet()
                rows += _rows(name, tp, measure(server, paths, tp, repeats))
    notes = (
        "Stall: from the pause (retract) to the end of its resumption, for all ways; Headrace with verify none.",
        "Memory: what was available on this machine before the first update by that way, less the least while it "
        "ran; Headrace's holder keeps the weights between updates.",
        "Copy: one plain copy of as many bytes as the worker with most has, all workers at once.",
        "To reach: commit/copy at most 1.3; stall at most commit + empty pause + 20 ms, and below both others.",
    )
    return Section("sglang", "SGLang 0.5.23 on a CPU: medians", COLUMNS, tuple(rows), notes)


def _rows(name: str, tp: int, found: dict[str, Row]) -> list[tuple[str, ...]]:
    copy, commit = found["ceiling"]["copy"], found["headrace"]["commit"]
    size = f"{found['headrace']['bytes'] / 1e9:.2f}"
    empty = found["headrace"]["empty"]
    own = (f"{commit * 1e3:.1f}", f"{copy * 1e3:.1f}", f"{commit / copy:.2f}", f"{empty * 1e3:.1f}")
    names = {"headrace": "Headrace", "disk": "/update_weights_from_disk", "tensor": "/update_weights_from_tensor"}
    return [
        (
            name, str(tp), size, title, f"{found[way]['stall'] * 1e3:.1f}", f"{found[way]['total'] * 1e3:.1f}",
            f"{found[way]['memory']:.2f}", *(own if way == "headrace" else ("",) * len(own)),
        )
        for way, title in names.items()
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=0, help="only this many schedulers")
    parser.add_argument("--model", choices=MAKERS, action="append", help="only this model; repeatable")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where models are made and kept")
    chosen = parser.parse_args()
    # Servers are no children of this process, and have none of the keys that file descriptors are passed with.
    torch.multiprocessing.set_sharing_strategy("file_system")
    with tempfile.TemporaryDirectory() as made:
        folder = chosen.folder or Path(made)
        folder.mkdir(exist_ok=True, parents=True)
        sizes = [chosen.tp] if chosen.tp else [1, 2]
        found = section(folder, chosen.model or ["dense", "mixture"], sizes, chosen.repeats)
        found.show(Console(width=180))


if __name__ == "__main__":
    main()
