"""A copy table bound to a GPU's memory: copy engines for long runs, one kernel for everything that is cut small."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from headrace.errors import TransferTimeoutError
from headrace.plan import CopyTable
from headrace.segments.cudart import cuda_runtime
from headrace.segments.pinning import PIN_CHUNK_BYTES
from headrace.transports.program import CopyProgram, addressable_bytes, check_dtypes, per_block
from headrace.transports.rows import Mask, Rows
from headrace.transports.strided import Blocks
from headrace.types import DTYPES, I32, I64

ENGINE_BYTES = 64 << 10
"""Least copy for a copy engine: below it starting one costs more than the kernel's lower rate. H100, from page-locked
memory, GB/s: batches of 16 KiB 30, of 64 KiB and more 52 to 53, the kernel 48 to 50 at any size."""
ENGINE_ROW_BYTES = 2048
"""Least row of a strided copy for a copy engine. GB/s at rows of 192, 768, 2048, 4096 bytes: engine 36, 48, 51, 53,
kernel 44, 48, 48, 50."""
LONG_BYTES = 16 << 20
"""From here on a run is a call of its own: 53.6 GB/s at 64 MiB, in a batch 51.7."""
PIECE_UNITS = 1024
"""Units per program of the kernel. Device to device, GB/s at 1024, 2048, 4096, 8192: 1425, 1317, 1319, 499."""
_BATCH = 1024
_POLL_S = 20e-6
_CAST = 1 << 16
_KERNEL_CASTS = frozenset({"bfloat16", "float16", "float32"})


@dataclass(frozen=True)
class _Launch:
    """Blocks of equal unit types, on the device, those of the own GPU first, with what a kernel must know of them."""

    table: torch.Tensor
    tile_block: torch.Tensor
    num_near: int
    types: tuple[str, str]
    dims: int


class CudaProgram:
    """Strided copies into one GPU's memory, ready to run as often as wished; `run` enqueues, `finish` waits.

    Long runs from page-locked host memory go through the copy engines, which are the fastest way over PCIe; strided and
    short ones from there, and all from GPUs, through a kernel that runs at the same time and reads the own GPU and
    others in turns. What neither can do (host memory that is not page-locked, rare casts and shapes) is left to torch.

    Ordering: `run` is ordered after what the current stream has been given, and before what it is given afterwards:
    the copy engines' stream waits for an event of the current stream, and that one waits for it in the end. Within a
    run destinations do not overlap, so the order of its copies does not matter.

    Args:
        copies: What to copy; destinations must not overlap.
        sources: Flat uint8 blocks that `src_block` indexes; page-locked ones must be so in chunks of
            `PIN_CHUNK_BYTES` from the begin of their storage, or as a whole.
        destinations: What `dst_block` indexes, see CopyProgram; those in use lie on one GPU or on the host.
        device: That GPU.
        peers: Sources that lie on other GPUs, as an address that CUDA IPC has mapped here does not tell.
        gentle: The GPU computes meanwhile: leave as much as possible to the copy engines, which disturb it least.

    Raises:
        PlanError: A row reaches outside its memory, or a destination has another dtype.
    """

    def __init__(
        self,
        copies: CopyTable,
        sources: Sequence[torch.Tensor],
        destinations: Sequence[torch.Tensor],
        device: torch.device,
        *,
        gentle: bool = False,
        peers: frozenset[int] = frozenset(),
    ) -> None:
        self._device = device
        self._peers = peers
        self._gentle = gentle
        self._memory = (tuple(sources), tuple(destinations))
        rows = np.flatnonzero(copies.num_elements)
        copies = copies.take(rows)
        check_dtypes(copies, destinations)
        source, target = Rows.sources(copies), Rows.destinations(copies)
        begins = _addresses(source, sources, "source"), _addresses(target, destinations, "destination")
        ours = _reachable(source.block, sources, device) & _on(target.block, destinations, device)
        ours &= _kernel_can(copies, begins)
        blocks, fits = Blocks.of(copies.take(ours), begins[0][ours], begins[1][ours])
        chosen = np.flatnonzero(ours)[fits]
        blocks = replace(blocks, row=rows[chosen])
        left = np.setdiff1d(np.arange(len(rows)), chosen)
        self._others_rows: I64 = rows[left]
        self._others = CopyProgram(copies.take(left), sources, destinations)
        self._bind(copies.take(chosen), blocks, sources)
        self._num_rows = int(rows[-1]) + 1 if len(rows) else 0

    def _bind(self, copies: CopyTable, blocks: Blocks, sources: Sequence[torch.Tensor]) -> None:
        """Divide the blocks between copy engines and kernel, and put what the kernel needs on the device."""
        exact = copies.src_dtype == copies.dst_dtype
        kind = np.where(
            exact, blocks.unit[:, 0], _CAST + copies.src_dtype.astype(np.int64) * 256 + copies.dst_dtype
        )
        far = ~_on(copies.src_block, sources, self._device) | np.isin(copies.src_block, tuple(self._peers))
        engine = exact & far & blocks.flat
        if not self._gentle:
            engine &= per_block(copies.src_block, sources, lambda s: not s.is_cuda)[copies.src_block] != 0
            engine &= blocks.num_bytes >= ENGINE_BYTES
            engine &= blocks.contiguous | (blocks.row_bytes >= ENGINE_ROW_BYTES)
        origins = per_block(copies.src_block, sources, lambda s: s.untyped_storage().data_ptr())
        whole, crossing = blocks.take(engine).cut_at(origins[copies.src_block[engine]], PIN_CHUNK_BYTES)
        batched = whole.contiguous & (whole.num_bytes < LONG_BYTES)
        self._batch = whole.take(batched)
        self._rectangles = _rectangles(whole.take(~batched))
        with torch.cuda.device(self._device), torch.inference_mode():
            self._kernels = self._launches(blocks.take(~engine), kind[~engine], far[~engine])
            self._kernels += self._launches(crossing, crossing.unit[:, 0])
            self._engine = blocks.take(engine)
            self._stream = _new_stream(self._device) if len(whole) else None

    def _launches(self, blocks: Blocks, kind: I64, far: Mask | None = None) -> list[_Launch]:
        """Group blocks by unit types and dims, and put each group's table on the device; by default none is far."""
        group = kind * 2 + blocks.flat
        far = np.zeros(len(blocks), bool) if far is None else far
        launches = []
        for one in np.unique(group).tolist():
            near, others = (np.flatnonzero((group == one) & side) for side in (~far, far))
            launches.append(self._launch(blocks.take(np.append(near, others)), len(near), one))
        return launches

    def _launch(self, blocks: Blocks, near_blocks: int, group: int) -> _Launch:
        table, tiles = _table(blocks)
        types, dims = _types(group // 2), 2 if group % 2 else 3
        _compile(types, dims, self._device)
        num_near = int(np.searchsorted(tiles, near_blocks))
        on_device = [torch.from_numpy(array).to(self._device) for array in (table, tiles)]
        return _Launch(on_device[0], on_device[1], num_near, types, dims)

    @property
    def table_bytes(self) -> int:
        """Device memory that the tables take."""
        return sum(one.table.nbytes + one.tile_block.nbytes for one in self._kernels)

    def run(self) -> None:
        """Enqueue everything once on the current stream; returns before it is done."""
        with torch.cuda.device(self._device), torch.inference_mode():
            current = torch.cuda.current_stream(self._device)
            if self._stream is not None:
                self._stream.wait_stream(current)
            # Kernels first: the GPU is at work on them while the copy engines are given their pieces one by one.
            for launch in self._kernels:
                _copy(launch)
            if self._stream is not None:
                self._run_engines(self._stream.cuda_stream)
                current.wait_stream(self._stream)
            self._others.run()

    def _run_engines(self, stream: int) -> None:
        runtime, batch = cuda_runtime(), self._batch
        runtime.copy_2d(self._rectangles, stream)
        for begin in range(0, len(batch), _BATCH):
            part = batch.take(slice(begin, begin + _BATCH))
            runtime.copy(part.destination, part.source, part.num_bytes, stream)

    def finish(self, deadline_s: float) -> None:
        """Wait until everything that the current stream has been given is done.

        Raises:
            TransferTimeoutError: Not within the deadline.
        """
        with torch.cuda.device(self._device):
            done = torch.cuda.current_stream(self._device).record_event()
        limit = time.monotonic() + deadline_s
        while not bool(done.query()):
            if time.monotonic() > limit:
                message = f"copies to {self._device} did not end within {deadline_s:.1f} s"
                raise TransferTimeoutError(message, phase="commit")
            time.sleep(_POLL_S)

    def differences(self) -> list[int]:
        """Return the rows whose destination does not have the bits that `run` writes, in ascending order. Blocking."""
        with torch.cuda.device(self._device), torch.inference_mode():
            different = torch.zeros(self._num_rows, dtype=torch.int32, device=self._device)
            for launch in (*self._kernels, *self._launches(self._engine, self._engine.unit[:, 0])):
                _compare(launch, different)
            found = different.nonzero().flatten().tolist()
        return sorted(found + self._others_rows[self._others.differences()].tolist())


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _rectangles(blocks: Blocks) -> I64:
    """Return what a copy engine takes: destination, pitch, source, pitch, width, rows; shape (N, 6)."""
    width = blocks.row_bytes
    pitches = (
        np.where(blocks.shape[:, 1] > 1, steps[:, 1], width)
        for steps in (blocks.destination_steps, blocks.source_steps)
    )
    columns = (blocks.destination, next(pitches), blocks.source, next(pitches), width, blocks.shape[:, 1])
    return np.stack(columns, axis=1)


def _types(kind: int) -> tuple[str, str]:
    """Return the names of the kernel's unit types: integers of `kind` bytes, or two dtypes of a cast."""
    if kind < _CAST:
        return f"int{8 * kind}", f"int{8 * kind}"
    source, destination = divmod(kind - _CAST, 256)
    return DTYPES[source].name, DTYPES[destination].name


def _table(blocks: Blocks) -> tuple[I64, I32]:
    """Return the kernel's table, shape (N, 12), and the block of each tile."""
    tiles = -(-blocks.num_units // PIECE_UNITS)
    steps = (blocks.source_steps // blocks.unit[:, :1], blocks.destination_steps // blocks.unit[:, 1:])
    first = np.cumsum(tiles) - tiles
    columns = (
        blocks.source,
        blocks.destination,
        *blocks.shape.T,
        *steps[0].T,
        *steps[1].T,
        first,
        blocks.row,
        first,
    )
    table = np.ascontiguousarray(np.stack(columns, axis=1))
    return table, np.repeat(np.arange(len(blocks), dtype=np.int32), tiles)


def _copy(launch: _Launch) -> None:
    import triton.language as tl  # noqa: PLC0415 - only machines with a GPU have it

    from headrace.transports import cuda_kernels  # noqa: PLC0415

    source, destination = (getattr(tl, name) for name in launch.types)
    cuda_kernels.copy_blocks[(len(launch.tile_block),)](
        launch.table,
        launch.tile_block,
        launch.num_near,
        SOURCE=source,
        DESTINATION=destination,
        BLOCK=PIECE_UNITS,
        DIMS=launch.dims,
    )


@lru_cache
def _compile(types: tuple[str, str], dims: int, device: torch.device) -> None:
    """Have the kernel compiled now, by a launch that copies nothing: the first commit must not wait for it."""
    nothing = torch.tensor([[0, 0, 0, 1, 1, *[0] * 7]], device=device)
    _copy(_Launch(nothing, torch.zeros(1, dtype=torch.int32, device=device), 1, types, dims))


def _compare(launch: _Launch, different: torch.Tensor) -> None:
    import triton.language as tl  # noqa: PLC0415

    from headrace.transports import cuda_kernels  # noqa: PLC0415

    source, destination = (getattr(tl, name) for name in launch.types)
    cast = source != destination
    cuda_kernels.compare_blocks[(len(launch.tile_block),)](
        launch.table, launch.tile_block, launch.num_near, different, SOURCE=source, DESTINATION=destination,
        BITS=getattr(tl, f"int{destination.primitive_bitwidth}"), BLOCK=PIECE_UNITS, DIMS=launch.dims, CAST=cast,
    )  # fmt: skip


def _addresses(rows: Rows, blocks: Sequence[torch.Tensor], side: str) -> I64:
    """Check that every row lies inside its block; return the addresses where they begin."""
    rows.check(per_block(rows.block, blocks, addressable_bytes).tolist(), side)
    begin = per_block(rows.block, blocks, lambda block: block.data_ptr())
    return np.asarray(begin[rows.block] + rows.base) if len(rows) else np.zeros(0, np.int64)


def _on(block: I32, blocks: Sequence[torch.Tensor], device: torch.device) -> Mask:
    return np.asarray(per_block(block, blocks, lambda b: b.device == device)[block] != 0)


def _reachable(block: I32, blocks: Sequence[torch.Tensor], device: torch.device) -> Mask:
    """Return whether the GPU can read a row's source: its own memory, a peer's, or page-locked host memory."""
    can = per_block(block, blocks, lambda b: _can_read(b, device))
    return np.asarray(can[block] != 0)


def _can_read(block: torch.Tensor, device: torch.device) -> bool:
    if not block.is_cuda:
        return block.is_pinned()
    return block.device == device or torch.cuda.can_device_access_peer(device, block.device)


def _kernel_can(copies: CopyTable, begins: tuple[I64, I64]) -> Mask:
    """Return which rows are plain copies, or casts between aligned elements that the kernel knows."""
    known = np.array([dtype.name in _KERNEL_CASTS for dtype in DTYPES])
    cast = known[copies.src_dtype] & known[copies.dst_dtype]
    for begin, rows in zip(begins, (Rows.sources(copies), Rows.destinations(copies)), strict=True):
        cast &= rows.aligned & (begin % rows.itemsize == 0)
    return np.asarray(cast | (copies.src_dtype == copies.dst_dtype))
