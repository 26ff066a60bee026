"""ShardSource: what one rank of a trainer holds, as a WeightSource that is read between two optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from headrace.errors import ConfigError, LocalProtocolError
from headrace.geometry import Box
from headrace.protocols import SourceRegion
from headrace.types import DTYPES, ParamMeta, ParamTable, dtype_code
from headrace_trainers.fence import StepFence


@dataclass(frozen=True)
class Piece:
    """A box of a parameter in this rank's memory.

    Attributes:
        name: The parameter, in checkpoint naming.
        box: Which part of it; not empty.
        local: Returns the tensor that holds it now, of the box's shape; strides and device are its own affair. Called
            for every read, as trainers exchange storage.
        is_computed: Whether `local` makes a new tensor each time.
    """

    name: str
    box: Box
    local: Callable[[], torch.Tensor]
    is_computed: bool = False


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
        on_gpu: Whether any shard lies on a GPU.

    Raises:
        ConfigError: `dtype` is no floating dtype, or a parameter's dtype is unknown.
    """

    reads_parts = True

    def __init__(self, shards: Shards, fence: StepFence, *, dtype: str | None = None) -> None:
        if dtype is not None and DTYPES[dtype_code(dtype)].kind != "float":
            raise ConfigError(f"cannot publish in {dtype}; choose a floating dtype such as bfloat16", name=dtype)
        self._params = ParamTable(_published(meta, dtype) for meta in shards.params)
        self._regions = tuple(SourceRegion(piece.name, piece.box) for piece in shards.pieces)
        self._pieces: Mapping[str, list[Piece]] = _by_name(shards.pieces)
        self._aliases = _aliases(shards.pieces, self._params)
        self._fence = fence
        self._devices = sorted({str(d) for piece in shards.pieces if (d := piece.local().device).type == "cuda"})
        self._written: dict[torch.device, torch.cuda.Event] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.on_gpu = bool(self._devices)

    @property
    def step(self) -> int:
        """The step that the weights are of."""
        return self._fence.step

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

    def at(self, step: int, deadline_s: float) -> AbstractContextManager[None]:
        """Return a context in which the weights are those of `step`, and training waits before it changes them.

        Raises:
            StepMissedError: That step cannot be had here.
            TransferTimeoutError: It did not come within the deadline.
        """
        return self._fence.reading(step, deadline_s)

    def mark_written(self) -> None:
        """Note that all work which makes the step's weights was given to the GPUs; by the training thread."""
        for name in self._devices:
            device = torch.device(name)
            with torch.cuda.device(device):
                event = self._written.setdefault(device, torch.cuda.Event())  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(device))

    def read(self, region: SourceRegion, out: memoryview) -> None:
        """Copy a region, or a box of one, into `out`, cast as torch's `copy_` does. Blocking; thread-safe.

        Raises:
            LocalProtocolError: This rank does not hold it, or `out` has another size.
        """
        index = self._params.index_of(region.name)
        if index is None or not self._pieces.get(region.name):
            message = f"no part of {region.name!r} is held here, or the source is closed"
            raise LocalProtocolError(message, name=region.name)
        kind = getattr(torch, self._params[index].dtype)
        if out.nbytes != region.box.num_elements * kind.itemsize:
            message = f"{region.name}: buffer has {out.nbytes} bytes, the region another size: {region.box}"
            raise LocalProtocolError(message, name=region.name)
        if out.nbytes:
            part = self._part(region)
            target = torch.frombuffer(out, dtype=torch.uint8).view(kind).view(region.box.shape)
            if part.is_cuda:
                self._fetch(part, target)
            else:
                target.copy_(part)

    def _part(self, region: SourceRegion) -> torch.Tensor:
        for piece in self._pieces[region.name]:
            if region.box == piece.box or region.box.intersect(piece.box) == region.box:
                tensor = piece.local().detach()
                shifts = (a - b for a, b in zip(region.box.offsets, piece.box.offsets, strict=True))
                for dim, (begin, extent) in enumerate(zip(shifts, region.box.shape, strict=True)):
                    tensor = tensor.narrow(dim, begin, extent)
                return tensor
        message = f"{region.name} {region.box} is in no piece of this rank"
        raise LocalProtocolError(message, name=region.name)

    def _fetch(self, part: torch.Tensor, target: torch.Tensor) -> None:
        """Copy from a GPU beside what training has it do: on a stream of our own, after the step's writes."""
        device = part.device
        with torch.cuda.device(device):
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                if device in self._written:
                    stream.wait_event(self._written[device])
                target.copy_(part.to(target.dtype), non_blocking=True)
            stream.synchronize()

    def close(self) -> None:
        """Forget the tensors; idempotent."""
        self._pieces = {}


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


def _by_name(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.name, []).append(piece)
    return found
