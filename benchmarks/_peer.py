"""checkpoint-engine (PyPI) on this machine's GPUs: a process per GPU that holds its part of a model in host memory.

As in production, its parameter servers broadcast and hand buckets by CUDA IPC to whoever serves.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks import _gpu
from benchmarks._models import Model
from headrace.segments.cuda import uuid_of
from headrace.testing.engine_process import free_port
from headrace.testing.recipe_backend import RecipeBackend
from headrace.types import ITEMSIZES

Handles = dict[str, str]
START_S = 300.0
UPDATE_S = 120.0


def is_installed() -> bool:
    """Return whether checkpoint-engine can be imported."""
    return find_spec("checkpoint_engine") is not None


class Peer:
    """checkpoint-engine's parameter servers, one per GPU, with a version of a model registered. Use as a context.

    Args:
        model: What they hold: places in the benchmark's pool, as `PoolSource` has them.
        world_size: Number of GPUs.
        version: Which version.
        bucket_gb: `PS_MAX_BUCKET_SIZE_GB`; None leaves checkpoint-engine's own choice.
    """

    def __init__(self, model: Model, world_size: int, version: int, bucket_gb: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        port = free_port()
        for rank in range(world_size):
            here, there = context.Pipe()
            told = (rank, world_size, model, version, port, bucket_gb)
            process = context.Process(target=_serve, args=(there, *told), daemon=True)
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)
        self.register_s = max(self._take(end, START_S) for end in self._ends)

    def update(self, trigger: Callable[[Handles], object]) -> tuple[float, float]:
        """Update once; returns the slowest rank's seconds of `gather_metas` and of `update`.

        Args:
            trigger: Called once, with the socket per device: makes every worker take its buckets, blocks until it has.
        """
        for end in self._ends:
            end.send("update")
        handles = [self._take(end, UPDATE_S) for end in self._ends]
        trigger(dict(handles[0]))
        for end in self._ends:
            end.send("taken")
        seconds = [self._take(end, UPDATE_S) for end in self._ends]
        gather_s, update_s = (max(column) for column in zip(*seconds, strict=True))
        return gather_s, update_s

    def close(self) -> None:
        """End the processes."""
        for end, process in zip(self._ends, self._processes, strict=True):
            end.send("exit")
            process.join(20)
            if process.is_alive():
                process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _take(end: Connection, deadline_s: float) -> Any:  # noqa: ANN401 - what the process sends
        if not end.poll(deadline_s):
            raise SystemExit(f"checkpoint-engine did not answer within {deadline_s:.0f} s")
        kind, value = end.recv()
        if kind == "failed":
            raise SystemExit(f"checkpoint-engine failed:\n{value}")
        return value


def take_buckets(backend: RecipeBackend, _receiver: object, handles: Handles) -> None:
    """Be the engine's side in a worker of a BareEngine: the loader takes what checkpoint-engine hands over."""
    import zmq  # noqa: PLC0415
    from checkpoint_engine.worker import update_weights_from_ipc  # noqa: PLC0415 - an extra

    device = torch.cuda.current_device()
    uuid = f"GPU-{uuid_of(device)}"
    context, places = zmq.Context(), _places(backend)

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            for box, target in places[name]:
                target.copy_(tensor[box])

    with torch.inference_mode():
        update_weights_from_ipc(context, handles[uuid], device, run=load)
    context.term()


@lru_cache(1)
def _places(backend: RecipeBackend) -> dict[str, list[tuple[tuple[slice, ...], torch.Tensor]]]:
    """Return where each source goes, as a loader would find it: slices of the source, and a view of a live tensor."""
    recipe, live, found = backend.recipe, list(backend.live_tensors().values()), defaultdict(list)
    regions, items = recipe.regions, ITEMSIZES[recipe.targets.dtype_codes]
    for row in range(len(regions)):
        meta, block = recipe.sources[int(regions.param[row])], int(regions.block[row])
        num_dims = len(meta.shape)
        begin, shape = regions.offsets[row, :num_dims].tolist(), regions.shape[row, :num_dims].tolist()
        strides = (regions.strides[row, :num_dims] // items[block]).tolist()
        box = tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))
        target = live[block].as_strided(shape, strides, int(regions.base[row]) // int(items[block]))
        found[meta.name].append((box, target))
    return found


def _serve(
    end: Connection, rank: int, world_size: int, model: Model, version: int, port: int, bucket_gb: int | None
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOGURU_LEVEL": "WARNING"}
    if bucket_gb is not None:
        os.environ["PS_MAX_BUCKET_SIZE_GB"] = str(bucket_gb)
    try:
        _obey(end, rank, world_size, model, version)
    except Exception:  # noqa: BLE001 - told to the benchmark, which ends with it
        end.send(("failed", traceback.format_exc()))
    os._exit(0)


def _obey(end: Connection, rank: int, world_size: int, model: Model, version: int) -> None:
    from checkpoint_engine.ps import ParameterServer  # noqa: PLC0415 - an extra

    torch.cuda.set_device(rank)
    server = ParameterServer(auto_pg=True)
    begin = time.perf_counter()
    server.register_checkpoint("one", named_tensors=_part(model, rank, world_size, version))
    end.send(("ok", time.perf_counter() - begin))
    while end.recv() == "update":
        taken = threading.Event()

        def request(paths: list[tuple[str, str]], taken: threading.Event = taken) -> None:
            end.send(("ok", paths))
            end.recv()
            taken.set()

        begin = time.perf_counter()
        server.gather_metas("one")
        middle = time.perf_counter()
        server.update("one", request)
        update_s = time.perf_counter() - middle
        taken.wait(UPDATE_S)
        end.send(("ok", (middle - begin, update_s)))


def _part(model: Model, rank: int, world_size: int, version: int) -> dict[str, torch.Tensor]:
    pool, found = _gpu.make_pool(), {}
    for meta in list(model.params())[rank::world_size]:
        begin = _gpu.place_of(meta.name, version, meta.num_bytes)
        kind = getattr(torch, meta.dtype)
        found[meta.name] = pool[begin : begin + meta.num_bytes].view(kind).view(meta.shape)
    return found
