"""ShardSource: what one rank of a trainer holds, as a WeightSource that is read between two optimizer steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from headrace.errors import ConfigError, LocalProtocolError
from headrace.geometry import Box
from headrace.protocols import DeviceReads, Slot, SourceRegion
from headrace.types import DTYPES, ParamMeta, ParamTable, dtype_code
from headrace_trainers.batches import Target
from headrace_trainers.device_reads import CudaLane, DeviceCopier, Event, Job, hold_back, wait_events
from headrace_trainers.fence import Reading, StepFence

_READ_S = 60.0


@dataclass(frozen=True)
class Piece:
    """A box of a parameter in this rank's memory.

    Attributes:
        name: The parameter, in checkpoint naming.
        box: Which part of it; not empty.
        local: Returns the tensor that holds it now, of the box's shape; strides and device are its own affair. Called
            for every read, as trainers exchange storage.
        origin: Where `local` makes a new tensor each time, returns one of those that it makes it of.
    """

    name: str
    box: Box
    local: Callable[[], torch.Tensor]
    origin: Callable[[], torch.Tensor] | None = None

    @property
    def is_computed(self) -> bool:
        """Whether `local` makes a new tensor each time."""
        return self.origin is not None

    @property
    def device(self) -> torch.device:
        """Where it lies now."""
        return (self.origin or self.local)().device


@dataclass(frozen=True)
class Shards:
    """One rank's part of a model.

    Attributes:
        params: All parameters of the model, whole, equal on all ranks.
        pieces: What this rank holds of them; disjoint.
    """

    params: tuple[ParamMeta, ...]
    pieces: tuple[Piece, ...]


class ShardSource:
    """A SteppedSource over a trainer's own memory: nothing is gathered, and what is not planned is not touched.

    Args:
        shards: What this rank holds; the tensors stay the trainer's.
        fence: This rank's steps.
        dtype: Floating dtype to publish floating parameters in; None keeps each one's own.

    Attributes:
        reads_parts: Regions may be read in boxes.
        device_type: Type of the devices that copy by themselves.
        make_lane: Makes their streams.

    Raises:
        ConfigError: `dtype` is no floating dtype, or a parameter's dtype is unknown.
    """

    reads_parts = True
    device_type = "cuda"
    make_lane = CudaLane

    def __init__(self, shards: Shards, fence: StepFence, *, dtype: str | None = None) -> None:
        if dtype is not None and DTYPES[dtype_code(dtype)].kind != "float":
            raise ConfigError(f"cannot publish in {dtype}; choose a floating dtype such as bfloat16", name=dtype)
        self._params = ParamTable(_published(meta, dtype) for meta in shards.params)
        self._regions = tuple(SourceRegion(piece.name, piece.box) for piece in shards.pieces)
        self._pieces: Mapping[str, list[Piece]] = _by_name(shards.pieces)
        self._aliases = _aliases(shards.pieces, self._params)
        self._fence = fence
        self._devices = {d for piece in shards.pieces if (d := piece.device).type == self.device_type}
        self._written: dict[torch.device, Event] = {}
        self._copiers: dict[torch.device, DeviceCopier] = {}

    @property
    def step(self) -> int:
        """The step that the weights are of."""
        return self._fence.step

    @property
    def on_gpu(self) -> bool:
        """Whether any shard lies on a GPU now."""
        return any(p.device.type == self.device_type for pieces in self._pieces.values() for p in pieces)

    def metadata(self) -> ParamTable:
        """Return all parameters of the model, in the dtypes that they are published in."""
        return self._params

    def regions(self) -> Sequence[SourceRegion]:
        """Return what this rank holds."""
        return self._regions

    def aliases(self) -> Mapping[int, int]:
        """Return which regions are the same memory as an earlier one: tied parameters."""
        return self._aliases

    def offer(self, attempt: int) -> int:
        """Return the next step that can be had, or one that is 1, 2, 4... steps later after failures."""
        if self._fence.ended:
            return self._fence.step
        return self._fence.next_readable + (1 << (attempt - 1) if attempt else 0)

    @contextmanager
    def at(self, step: int, deadline_s: float) -> Iterator[DeviceReads | None]:
        """Return a context in which the weights are those of `step`, and training waits before it changes them.

        Raises:
            StepMissedError: That step cannot be had here.
            TransferTimeoutError: It did not come within the deadline.
        """
        with self._fence.reading(step, deadline_s) as reading:
            yield ShardReads(self, reading) if self._written or self.on_gpu else None

    def mark_written(self) -> None:
        """Note that all work which makes the step's weights was given to the GPUs; by the training thread.

        Also where shards lie in host memory: what they hold may come from a GPU that is still at work.
        """
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for device in self._devices | {torch.device("cuda", torch.cuda.current_device())}:
                self._written[device] = torch.cuda.current_stream(device).record_event()

    def written(self, device: torch.device) -> Event | None:
        """Return the mark behind a device's work on the newest step; None where that is waited for here instead."""
        if device not in self._written and device.type == "cuda":  # a shard has come to it since `mark_written`
            self._devices.add(device)
            torch.cuda.synchronize(device)
        return self._written.get(device)

    def all_written(self) -> Sequence[Event]:
        """Return the marks of all devices."""
        return list(self._written.values())

    def hold_back(self, copied: Mapping[torch.device, Sequence[Event]]) -> None:
        """Have what the training thread gives its devices from now on come after marks of theirs; called in it."""
        hold_back(copied)

    def device_job(self, slot: Slot) -> tuple[torch.device, Job] | None:
        """Return the device that copies a region by itself, and what it has to do; None where the host reads it."""
        piece, kind = self._piece(slot.region), self._kind(slot.region.name)
        if piece is None or (device := piece.device).type != self.device_type:
            return None
        local = piece.local if slot.region.box == piece.box else lambda: _narrowed(piece, slot.region.box)
        return device, Job(local, Target(kind, slot.segment, slot.begin), piece.is_computed)

    def copier(self, device: torch.device) -> DeviceCopier:
        """Return what copies out of a device; made when it is needed first."""
        if device not in self._copiers:
            self._copiers[device] = DeviceCopier(device, self.make_lane)
        return self._copiers[device]

    def read(self, region: SourceRegion, out: memoryview) -> None:
        """Copy a region, or a box of one, into `out`, cast as torch's `copy_` does. Blocking; thread-safe.

        Raises:
            LocalProtocolError: This rank does not hold it, or `out` has another size.
        """
        piece, kind = self._piece(region), self._kind(region.name)
        if out.nbytes != region.box.num_elements * kind.itemsize:
            message = f"{region.name}: buffer has {out.nbytes} bytes, the region another size: {region.box}"
            raise LocalProtocolError(message, name=region.name)
        if not out.nbytes or piece is None:
            return
        memory = torch.frombuffer(out, dtype=torch.uint8)
        found = self.device_job(Slot(region, 0, 0, out.nbytes))
        if found is None:
            memory.view(kind).view(region.box.shape).copy_(_narrowed(piece, region.box))
        else:
            device, job = found
            copied, _alive = self.copier(device).submit([job], [memory], self.written(device))
            wait_events(copied, _READ_S, f"copying {region.name} out of {device}")

    def _kind(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is published.

        Raises:
            LocalProtocolError: This rank does not hold it.
        """
        index = self._params.index_of(name)
        if index is None or not self._pieces.get(name):
            message = f"no part of {name!r} is held here, or the source is closed"
            raise LocalProtocolError(message, name=name)
        kind: torch.dtype = getattr(torch, self._params[index].dtype)
        return kind

    def _piece(self, region: SourceRegion) -> Piece | None:
        """Return the piece that a region is of, or None where it is empty.

        Raises:
            LocalProtocolError: There is none here.
        """
        for piece in self._pieces.get(region.name, ()):
            if region.box == piece.box or region.box.intersect(piece.box) == region.box:
                return piece
        if region.name in self._pieces and not region.box.num_elements:
            return None
        message = f"{region.name!r} {region.box} is in no piece of this rank, or the source is closed"
        raise LocalProtocolError(message, name=region.name)

    def close(self) -> None:
        """Forget the tensors; idempotent."""
        self._pieces, self._copiers = {}, {}


class ShardReads:
    """DeviceReads of one step of a ShardSource: each GPU copies what lies on it, the host what lies there.

    Args:
        source: The shards.
        reading: What holds training until the host has read its part.
    """

    def __init__(self, source: ShardSource, reading: Reading) -> None:
        self._source = source
        self._reading = reading
        self._copied: dict[torch.device, list[Event]] = {}
        self._alive: list[torch.Tensor] = []

    def submit(self, slots: Sequence[Slot], segments: Sequence[torch.Tensor], deadline_s: float) -> Sequence[Slot]:
        """Have GPUs copy into the segments what they hold; returns before that is done, with the slots left to `read`.

        Raises:
            TransferTimeoutError: The work that makes this step was not done within the deadline.
        """
        jobs: dict[torch.device, list[Job]] = {}
        left: list[Slot] = []
        for slot in {(one.segment, one.begin): one for one in slots if one.num_bytes}.values():
            found = self._source.device_job(slot)
            if found is None:
                left.append(slot)
            else:
                jobs.setdefault(found[0], []).append(found[1])
        for device, own in jobs.items():
            copied, alive = self._source.copier(device).submit(own, segments, self._source.written(device))
            self._copied[device] = copied
            self._alive += alive
        if left:
            wait_events(self._source.all_written(), deadline_s, "the work of this step on the GPU")
        return left

    def wait(self, deadline_s: float) -> None:
        """Let training go on, its GPUs' next writes behind the reads, then wait until these are done.

        Raises:
            TransferTimeoutError: Not within the deadline; the segments are still being written to.
        """
        begin = time.monotonic()
        self._reading.leave(lambda: self._source.hold_back(self._copied))
        for device, copied in self._copied.items():
            wait_events(copied, begin + deadline_s - time.monotonic(), f"copying the weights out of {device}")
        self._alive = []


def _published(meta: ParamMeta, dtype: str | None) -> ParamMeta:
    is_float = DTYPES[dtype_code(meta.dtype)].kind == "float"
    return ParamMeta(meta.name, dtype, meta.shape) if dtype and is_float else meta


def _aliases(pieces: Sequence[Piece], params: ParamTable) -> dict[int, int]:
    """Return pieces that lie where an earlier one lies, and are published in the same dtype."""
    found: dict[int, int] = {}
    seen: dict[tuple[object, ...], int] = {}
    for number, piece in enumerate(pieces):
        if piece.is_computed:
            continue
        tensor, index = piece.local(), params.index_of(piece.name)
        kind = params[index].dtype if index is not None else ""
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), piece.box, kind)
        if seen.setdefault(key, number) != number:
            found[number] = seen[key]
    return found


def _narrowed(piece: Piece, box: Box) -> torch.Tensor:
    """Return a box of a piece."""
    tensor = piece.local().detach()
    for dim, (begin, own, extent) in enumerate(zip(box.offsets, piece.box.offsets, box.shape, strict=True)):
        tensor = tensor.narrow(dim, begin - own, extent)
    return tensor


def _by_name(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.name, []).append(piece)
    return found
