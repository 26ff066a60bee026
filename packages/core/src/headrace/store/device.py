"""Weights that lie on GPUs of this process and are lent where they are: a colocated trainer's shards."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from secrets import token_hex

import torch

from headrace.errors import ConfigError, LocalProtocolError
from headrace.geometry import Box, RegionTable, contiguous_strides
from headrace.manifest import HolderAddress, Manifest
from headrace.protocols import SourceRegion
from headrace.segments.cuda import CudaSegment
from headrace.store.reading import Progress
from headrace.store.single import SingleVersion
from headrace.store.store import PublishedVersion
from headrace.types import ParamMeta, ParamTable, dtype_code


@dataclass(frozen=True)
class Shard:
    """A box of a parameter in a contiguous tensor on a GPU, in the parameter's dtype."""

    meta: ParamMeta
    box: Box
    tensor: torch.Tensor


class DeviceSource:
    """A WeightSource that is lent in place: engines of this host read the shards from the GPUs that hold them.

    Nothing is copied and no memory is taken, so the shards must not change from the begin of an update to its end:
    `ParameterServer.update` returns when no engine reads them any more.

    Args:
        shards: What this process holds; kept by reference.

    Raises:
        ConfigError: A shard is not a contiguous CUDA tensor of its parameter's dtype and its box's shape; names it.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self.shards = tuple(shards)
        for shard in self.shards:
            _check(shard)
        self._params = ParamTable({shard.meta.name: shard.meta for shard in self.shards}.values())
        self._regions = tuple(SourceRegion(shard.meta.name, shard.box) for shard in self.shards)

    def metadata(self) -> ParamTable:
        """Return the parameters of all shards."""
        return self._params

    def regions(self) -> Sequence[SourceRegion]:
        """Return the shards' boxes."""
        return self._regions

    def read(self, region: SourceRegion, out: memoryview) -> None:
        """Copy a shard into host memory. Blocking.

        Raises:
            LocalProtocolError: There is no such shard.
        """
        for shard in self.shards:
            if (shard.meta.name, shard.box) == (region.name, region.box):
                flat = shard.tensor.detach().reshape(-1).view(torch.uint8)
                torch.frombuffer(out, dtype=torch.uint8).copy_(flat)
                return
        raise LocalProtocolError(f"no shard {region.name} {region.box} is held here", name=region.name)

    def close(self) -> None:
        """Forget the shards; idempotent."""
        self.shards = ()


class LentStore(SingleVersion[CudaSegment]):
    """Holds no version but what its source holds at the moment; has the calls of Store that a holder needs.

    Args:
        source: What is lent.
        holder_name: Unique name of this holder.
    """

    def __init__(self, source: DeviceSource, holder_name: str) -> None:
        super().__init__(holder_name)
        self._source = source
        self._salt = token_hex(16)

    def publish(
        self,
        version: int,
        progress: Progress | None = None,
        deadline_s: float = 0.0,  # noqa: ARG002 - as Store's
    ) -> PublishedVersion:
        """Lend what the shards hold now, once everything that their GPUs were given is done. Blocking.

        Raises:
            LocalProtocolError: The version does not grow.
            ConfigError: A shard's memory cannot be lent.
        """
        self._check_grows(version, max(self.versions, default=-1))
        begin = time.monotonic()
        for device in {shard.tensor.device for shard in self._source.shards}:
            torch.cuda.synchronize(device)
        self._segments, regions = self._place()
        descriptors = tuple(segment.descriptor for segment in self._segments)
        manifest = Manifest(HolderAddress(self._name), version, self._source.metadata(), descriptors, regions)
        num_bytes = sum(shard.tensor.nbytes for shard in self._source.shards)
        self._published = PublishedVersion(version, manifest, num_bytes, time.monotonic() - begin)
        if progress is not None:
            progress(num_bytes, num_bytes)
        return self._published

    def _place(self) -> tuple[tuple[CudaSegment, ...], RegionTable]:
        """Find the allocations that the shards lie in, and where in them."""
        found: list[CudaSegment] = []
        rows, params = [], self._source.metadata()
        for shard in sorted(self._source.shards, key=lambda one: one.tensor.data_ptr()):
            address = shard.tensor.data_ptr()
            last = found[-1] if found else None
            if last is None or not last.address <= address < last.address + last.descriptor.num_bytes:
                with torch.cuda.device(shard.tensor.device):
                    found.append(CudaSegment(address, self._salt))
            strides = contiguous_strides(shard.box.shape, shard.tensor.element_size())
            index = params.index_of(shard.meta.name) or 0
            rows.append((index, shard.box, len(found) - 1, address - found[-1].address, strides))
        return tuple(found), RegionTable.from_rows(rows, params.max_ndim)

    def release(self, version: int) -> None:
        """Stop lending a version; idempotent."""
        if self._published is not None and self._published.version == version:
            self._published, self._segments = None, ()

    def close(self) -> None:
        """Stop lending; idempotent."""
        self._published, self._segments = None, ()


def _check(shard: Shard) -> None:
    name, tensor, kind = shard.meta.name, shard.tensor, f"torch.{shard.meta.dtype}"
    dtype_code(shard.meta.dtype)
    problem = ""
    if not tensor.is_cuda:
        problem = f"lies on {tensor.device}, not on a GPU"
    elif not tensor.is_contiguous() or tuple(tensor.shape) != shard.box.shape:
        problem = f"is not a contiguous tensor of shape {shard.box.shape}"
    elif str(tensor.dtype) != kind:
        problem = f"holds {tensor.dtype}, its parameter {kind}"
    if problem:
        raise ConfigError(f"shard of {name} {problem}; publish it as a TensorSource instead", name=name)
