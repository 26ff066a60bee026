"""What the GPU benchmarks share: a source made of one pool of random bytes, workers on GPUs, ceilings, checks."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Self

import numpy as np
import torch
import torch.distributed as dist

from benchmarks._models import Model
from headrace.config import host_settings
from headrace.geometry import Box
from headrace.protocols import InferenceBackend, SourceRegion
from headrace.recording.cache import RecipeCache
from headrace.store.device import Shard
from headrace.testing.recipe_backend import RecipeBackend
from headrace.types import ITEMSIZES, ParamTable, WorkerId

POOL_BYTES = 3 << 29
MOVED_BYTES = 1 << 33
BLOCK_BYTES = 1 << 31
BROADCAST_BYTES = 1 << 30
_SEED = 11
_busy: dict[str, object] = {}


def make_pool(*, finite: bool = False) -> torch.Tensor:
    """Return random bytes, the same in every process; `finite` ones are bfloat16 below 2, for engines that compute."""
    made = torch.Generator().manual_seed(_SEED)
    words = torch.empty(POOL_BYTES // 8, dtype=torch.int64).random_(generator=made)
    if finite:
        words.view(torch.int16).bitwise_and_(-0x4001)
    return words.view(torch.uint8)


def place_of(name: str, version: int, num_bytes: int) -> int:
    """Return where in the pool a tensor's bytes of a version begin."""
    return (zlib.crc32(name.encode()) * 64 + version * 4160) % (POOL_BYTES - num_bytes) // 64 * 64


@dataclass
class Version:
    """A version number; parts of one source share one of `multiprocessing`, which looks the same."""

    value: int = 0


class PoolSource:
    """A WeightSource whose tensors are places in one pool: 61 GB of weights take 1.6 GB.

    Set `version` before each update.

    Args:
        model: Which tensors.
        part: Of equal parts, which one is held.
        parts: Number of parts, each with a source of its own.
        version: The version of all parts; by default this source's own.
    """

    def __init__(
        self,
        model: Model,
        part: int = 0,
        parts: int = 1,
        version: Version | None = None,
        *,
        finite: bool = False,
    ) -> None:
        self._params = model.params()
        names = set(_part_of(self._params, part, parts))
        self._regions = tuple(SourceRegion(m.name, Box.whole(m.shape)) for m in self._params if m.name in names)
        self._pool = make_pool(finite=finite)
        self._version = version or Version()

    @property
    def version(self) -> int:
        """The version that is read."""
        return self._version.value

    @version.setter
    def version(self, value: int) -> None:
        self._version.value = value

    def metadata(self) -> ParamTable:
        """Return the model's parameters."""
        return self._params

    def regions(self) -> Sequence[SourceRegion]:
        """Return every parameter, whole."""
        return self._regions

    def read(self, region: SourceRegion, out: memoryview) -> None:
        """Copy the tensor's place in the pool."""
        begin = place_of(region.name, self.version, len(out))
        torch.frombuffer(out, dtype=torch.uint8).copy_(self._pool[begin : begin + len(out)])

    def close(self) -> None:
        """Nothing to release."""


def _part_of(params: ParamTable, part: int, parts: int) -> list[str]:
    """Return the names of one of `parts` parts of about equal bytes."""
    sizes = [0] * parts
    names: list[list[str]] = [[] for _ in range(parts)]
    for meta in sorted(params, key=lambda meta: (-meta.num_bytes, meta.name)):
        least = sizes.index(min(sizes))
        sizes[least] += meta.num_bytes
        names[least].append(meta.name)
    return names[part]


def pool_part(part: int, parts: int, model: Model, version: Version) -> PoolSource:
    """Return a part of the pool's source, for a HoldingCrew."""
    return PoolSource(model, part, parts, version)


def make_shards(model: Model, num_gpus: int) -> list[Shard]:
    """Return a trainer's shards as FSDP2 cuts them: equal parts of every tensor's rows on each GPU; no content yet."""
    shards = []
    for meta in model.params():
        each = -(-meta.shape[0] // num_gpus)
        for gpu in range(num_gpus):
            begin, end = min(gpu * each, meta.shape[0]), min((gpu + 1) * each, meta.shape[0])
            box = Box((begin, *(0,) * (len(meta.shape) - 1)), (end - begin, *meta.shape[1:]))
            if end > begin:
                kind = getattr(torch, meta.dtype)
                shards.append(Shard(meta, box, torch.empty(box.shape, dtype=kind, device=f"cuda:{gpu}")))
    return shards


def bytes_of_peers(model: Model, num_gpus: int, rank: int) -> int:
    """Return how much of what a worker needs lies in shards of other GPUs."""
    recipe = model.recipe(num_gpus, rank)
    regions, rows = recipe.regions, recipe.sources.shapes[recipe.regions.param, 0]
    each = -(-rows // num_gpus)
    begin, end = np.minimum(rank * each, rows), np.minimum((rank + 1) * each, rows)
    first, last = regions.offsets[:, 0], regions.offsets[:, 0] + regions.shape[:, 0]
    own = np.maximum(np.minimum(last, end) - np.maximum(first, begin), 0)
    sizes = regions.num_elements * ITEMSIZES[recipe.sources.dtype_codes[regions.param]]
    return int((sizes * (regions.shape[:, 0] - own) // np.maximum(regions.shape[:, 0], 1)).sum())


def write_shards(shards: Sequence[Shard], pools: Sequence[torch.Tensor], version: int) -> None:
    """Write a version into a trainer's shards; `pools` is the pool on each GPU."""
    for shard in shards:
        row_bytes = shard.meta.num_bytes // shard.meta.shape[0]
        begin = place_of(shard.meta.name, version, shard.meta.num_bytes) + shard.box.offsets[0] * row_bytes
        part = pools[shard.tensor.device.index][begin : begin + shard.tensor.nbytes]
        shard.tensor.view(torch.uint8).view(-1).copy_(part)


def peer_to_peer() -> float:
    """Return bytes per second from one GPU into another, both ways at once."""
    buffers = [
        [torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=f"cuda:{gpu}") for _ in range(2)]
        for gpu in range(2)
    ]
    streams = [[torch.cuda.Stream(gpu) for gpu in range(2)] for _ in range(2)]

    def work() -> None:
        for gpu, (first, second) in enumerate(streams):
            with torch.cuda.stream(first), torch.cuda.stream(second):
                buffers[gpu][0].copy_(buffers[1 - gpu][1], non_blocking=True)
        for stream in (*streams[0], *streams[1]):
            stream.synchronize()

    return BLOCK_BYTES / _seconds(work)


def gpu_worker(worker: WorkerId, world_size: int, model: Model) -> RecipeBackend:
    """Make a worker on the GPU of its rank; its recipe is known, as after an earlier start."""
    torch.cuda.set_device(worker.rank)
    backend = RecipeBackend(
        model.recipe(world_size, worker.rank), worker, world_size, device=f"cuda:{worker.rank}"
    )
    RecipeCache(host_settings().recipe_cache).put(
        backend.identity().layout, model.recipe(world_size, worker.rank)
    )
    return backend


def poison(backend: InferenceBackend, _receiver: object = None) -> None:
    """Overwrite all live bytes."""
    for tensor in backend.live_tensors().values():
        tensor.view(torch.uint8).fill_(0xEE)
    torch.cuda.synchronize()


def wrong_tensors(backend: RecipeBackend, _receiver: object, version: int) -> list[str]:
    """Return the parameters whose live bytes are not those of `version`; compares every byte."""
    recipe, pool = backend.recipe, make_pool().cuda()
    live, regions, items = list(backend.live_tensors().values()), backend.recipe.regions, ITEMSIZES
    wrong = []
    for row in range(len(regions)):
        meta, block = recipe.sources[int(regions.param[row])], int(regions.block[row])
        begin = place_of(meta.name, version, meta.num_bytes)
        part = pool[begin : begin + meta.num_bytes].view(torch.int16).view(meta.shape)
        for dim in range(len(meta.shape)):
            part = part.narrow(dim, int(regions.offsets[row, dim]), int(regions.shape[row, dim]))
        size = int(items[recipe.targets.dtype_codes[block]])
        strides = (regions.strides[row, : part.dim()] // size).tolist()
        found = live[block].view(torch.int16).as_strided(part.shape, strides, int(regions.base[row]) // size)
        if not torch.equal(found, part):
            wrong.append(meta.name)
    torch.cuda.empty_cache()
    return wrong


def _seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of `work`, device included, after two warm-ups."""
    taken = []
    for number in range(2 + repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if number >= 2:
            taken.append(time.perf_counter() - begin)
    return median(taken)


def host_to_device(_backend: InferenceBackend, _receiver: object) -> float:
    """Return bytes per second from pinned memory into this worker's GPU, in large copies."""
    host = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda")

    def work() -> None:
        for _ in range(MOVED_BYTES // BLOCK_BYTES):
            there.copy_(host, non_blocking=True)

    return MOVED_BYTES / _seconds(work)


def broadcast(backend: InferenceBackend, _receiver: object, port: int) -> float:
    """Return bytes per second of an NCCL broadcast among the workers, in large buffers."""
    identity = backend.identity()
    rank, world_size = identity.worker.rank, identity.world_size
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size)
    buffer = torch.empty(BROADCAST_BYTES, dtype=torch.uint8, device="cuda")
    try:
        return BROADCAST_BYTES / _seconds(lambda: dist.broadcast(buffer, 0))
    finally:
        dist.destroy_process_group()


def device_used(_backend: InferenceBackend, _receiver: object) -> int:
    """Return what the whole device has in use, by all processes."""
    return _used_bytes(torch.cuda.current_device())


def device_to_device(_backend: InferenceBackend, _receiver: object) -> float:
    """Return payload bytes per second of one large copy inside this worker's GPU."""
    one, other = (torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    return BLOCK_BYTES / _seconds(lambda: one.copy_(other))


def release(_backend: InferenceBackend, _receiver: object) -> None:
    """Give memory that the ceilings took back to the device."""
    torch.cuda.empty_cache()


def device_peak(backend: InferenceBackend, _receiver: object) -> int:
    """Return the most device memory that was in use since the last call, beside the live tensors."""
    live = sum(t.nbytes for t in backend.live_tensors().values())
    peak = torch.cuda.max_memory_allocated() - live
    torch.cuda.reset_peak_memory_stats()
    return peak


class MemoryWatch:
    """Watches the first GPU from outside: the most memory in use beside what was at the begin. Use as a context."""

    def __init__(self) -> None:
        self._before = _used_bytes()
        self.most_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.most_bytes = max(self.most_bytes, _used_bytes() - self._before)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)


def _used_bytes(gpu: int = 0) -> int:
    free, total = torch.cuda.mem_get_info(gpu)
    return total - free


def start_products(_backend: InferenceBackend, _receiver: object) -> None:
    """Multiply matrices in a thread until `stop_products`."""
    stop = threading.Event()
    times: list[tuple[float, float]] = []
    device = torch.cuda.current_device()

    def loop() -> None:
        torch.cuda.set_device(device)
        left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        right = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not stop.is_set():
                begin = time.monotonic()
                for _ in range(8):
                    torch.mm(left, right)
                stream.synchronize()
                times.append((begin, time.monotonic() - begin))

    thread = threading.Thread(target=loop, daemon=True)
    _busy.update(stop=stop, times=times, thread=thread)
    thread.start()


def stop_products(_backend: InferenceBackend, _receiver: object) -> list[tuple[float, float]]:
    """End the thread; return when each round began and how long it took, on the host's monotonic clock."""
    stop, thread, times = _busy["stop"], _busy["thread"], _busy["times"]
    stop.set()  # type: ignore[attr-defined]
    thread.join(10.0)  # type: ignore[attr-defined]
    return list(times)  # type: ignore[call-overload]
