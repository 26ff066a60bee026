"""Live torch tensors as a WeightSource."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from headrace.errors import CheckpointError, ConfigError, LocalProtocolError
from headrace.geometry import Box
from headrace.protocols import SourceRegion
from headrace.types import DTYPES, ParamMeta, ParamTable, dtype_code


class TensorSource:
    """Whole tensors of this process, read when they are published: what they hold then is the version.

    Tied tensors are published under each of their names. Any strides and devices; nothing is gathered.

    Args:
        tensors: Names in checkpoint naming and their tensors; kept by reference: a parameter whose `data`
            is replaced later is followed.
        dtype: Floating dtype to publish floating tensors in (integers and quantised ones stay as they are);
            None keeps each tensor's own.

    Attributes:
        reads_parts: Regions may be read in boxes.

    Raises:
        ConfigError: A name occurs twice, or a tensor cannot be published; names it.
    """

    reads_parts = True

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        dtype: str | None = None,
    ) -> None:
        if dtype is not None and DTYPES[dtype_code(dtype)].kind != "float":
            raise ConfigError(
                f"cannot publish in {dtype}; choose a floating dtype such as bfloat16", name=dtype
            )
        pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
        for name, tensor in pairs:
            _check(name, tensor)
        self._params = ParamTable(_meta(name, tensor, dtype) for name, tensor in pairs)
        self._regions = tuple(SourceRegion(meta.name, Box.whole(meta.shape)) for meta in self._params)
        self._tensors = dict(pairs)

    def metadata(self) -> ParamTable:
        """Return all tensors in the order given."""
        return self._params

    def regions(self) -> Sequence[SourceRegion]:
        """Return all tensors, whole."""
        return self._regions

    def read(self, region: SourceRegion, out: memoryview) -> None:
        """Copy a region, or a box of it, into `out`, casting as torch's `copy_` does. Blocking; thread-safe.

        Raises:
            CheckpointError: The tensor's owner has freed or reshaped it.
        """
        tensor, index = self._tensors.get(region.name), self._params.index_of(region.name)
        if tensor is None or index is None:
            message = f"no tensor {region.name!r} is published here, or the source is closed"
            raise LocalProtocolError(message, name=region.name)
        kind = getattr(torch, self._params[index].dtype)
        if out.nbytes != region.box.num_elements * kind.itemsize:
            message = f"{region.name}: buffer has {out.nbytes} bytes, the region another size: {region.box}"
            raise LocalProtocolError(message, name=region.name)
        if out.nbytes == 0:
            return
        tensor = tensor.detach()
        if tuple(tensor.shape) != self._params[index].shape or tensor.untyped_storage().nbytes() == 0:
            message = f"{region.name}: its owner has freed or reshaped it; publish while it is materialised"
            raise CheckpointError(message, name=region.name)
        for dim, (begin, extent) in enumerate(zip(region.box.offsets, region.box.shape, strict=True)):
            tensor = tensor.narrow(dim, begin, extent)
        target = torch.frombuffer(out, dtype=torch.uint8).view(kind).view(region.box.shape)
        target.copy_(tensor)

    def close(self) -> None:
        """Forget the tensors; idempotent."""
        self._tensors = {}


def _check(name: str, tensor: torch.Tensor) -> None:
    problem = ""
    if tensor.is_meta:
        problem = "has no data (meta device)"
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        problem = "is sparse or packed"
    elif hasattr(tensor, "to_local"):
        problem = "is a distributed tensor: publish it through its trainer's source"
    if problem:
        raise ConfigError(f"tensor {name!r} {problem}", name=name)


def _meta(name: str, tensor: torch.Tensor, dtype: str | None) -> ParamMeta:
    own = str(tensor.dtype).removeprefix("torch.")
    is_float = DTYPES[dtype_code(own)].kind == "float"
    return ParamMeta(name, dtype if dtype and is_float else own, tuple(tensor.shape))
