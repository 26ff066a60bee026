"""Where checkpoint tensors land in this rank's shards, and the loader that puts them there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from headrace.errors import ApplyError, ConfigError
from headrace.geometry import Box, Shape

if TYPE_CHECKING:
    from headrace.embedded.naming import CheckpointNaming, Landing
    from headrace.protocols import NamedTensors


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the whole tensor and the index in the shard at which it begins."""

    box: Box
    local: Shape


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """What one rank holds of a tensor: pieces that lie one after the other along `dim` of the shard."""

    shape: Shape
    local_shape: Shape
    pieces: tuple[Piece, ...]
    dim: int = 0


def shard_layout(tensor: torch.Tensor) -> ShardLayout:
    """Return what this rank holds of a plain tensor (all of it) or of a DTensor on a one-dimensional mesh.

    Raises:
        ConfigError: A placement that is neither replicated nor sharded.
    """
    shape = tuple(tensor.shape)
    placement = tensor.placements[0] if isinstance(tensor, DTensor) else None
    if not isinstance(tensor, DTensor) or placement is None or placement.is_replicate():
        whole = Box.whole(shape)
        return ShardLayout(shape, shape, (Piece(whole, whole.offsets),))
    if tensor.device_mesh.ndim != 1:
        raise ConfigError(
            f"the device mesh has {tensor.device_mesh.ndim} dims; only tensor parallelism is supported"
        )
    if isinstance(placement, _StridedShard):
        return _strided_layout(tensor, placement)
    if not isinstance(placement, ShardPlacement):
        raise ConfigError(f"placement {placement} is not supported; only Shard and Replicate are")
    local, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    box = Box(tuple(offsets), tuple(local))
    return ShardLayout(shape, box.shape, (Piece(box, (0,) * len(shape)),), placement.dim % len(shape))


def _strided_layout(tensor: DTensor, placement: _StridedShard) -> ShardLayout:
    """Return the layout of fused projections: this rank's part of each of `split_factor` groups, joined."""
    shape = tuple(tensor.shape)
    dim = placement.dim % len(shape)
    rank, world_size = tensor.device_mesh.get_local_rank(), tensor.device_mesh.size()
    width = ceil(shape[dim] / placement.split_factor)
    pieces, filled = [], 0
    for begin in range(0, shape[dim], width):
        group = min(width, shape[dim] - begin)
        extent, offset = ShardPlacement.local_shard_size_and_offset(group, world_size, rank)
        pieces.append(
            Piece(_slab(shape, dim, begin + offset, extent), _slab(shape, dim, filled, extent).offsets)
        )
        filled += extent
    return ShardLayout(shape, (*shape[:dim], filled, *shape[dim + 1 :]), tuple(pieces), dim)


def _slab(shape: Shape, dim: int, begin: int, extent: int) -> Box:
    offsets = tuple(begin if d == dim else 0 for d in range(len(shape)))
    return Box(offsets, (*shape[:dim], extent, *shape[dim + 1 :]))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard, sharing memory, without gradient."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


class ShardLoader:
    """Copies full checkpoint tensors into shards.

    Only views and `copy_` touch a tensor wherever the naming allows it, so that copies can be recorded. The
    rest (permuted or split weights) goes through transformers' own conversion of complete groups.
    """

    def __init__(
        self,
        naming: CheckpointNaming,
        layouts: Mapping[str, ShardLayout],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        self._naming = naming
        self._layouts = layouts
        self._tensors = tensors

    @torch.no_grad()
    def load(self, pairs: NamedTensors) -> None:
        """Copy `(checkpoint name, full tensor)` pairs into the shards; names the model lacks are ignored.

        Raises:
            ApplyError: A tensor's shape does not fit, or a group that is converted together is incomplete.
        """
        groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in pairs:
            landing = self._naming.landing(name)
            if landing is None or landing.target not in self._layouts:
                continue
            if landing.grouped or not self._place(name, tensor, landing):
                groups.setdefault(landing.target, []).append((name, tensor))
        for group in groups.values():
            for target, tensor in self._naming.convert(group):
                self._write(target, tensor, target, (0,) * tensor.ndim)

    def _place(self, name: str, tensor: torch.Tensor, landing: Landing) -> bool:
        """Copy one tensor to its place in the target; False where its extents say that it has none."""
        shape = self._layouts[landing.target].shape
        if landing.item is not None:
            tensor = tensor.unsqueeze(0)
        offsets = [landing.item or 0] + [0] * (len(shape) - 1) if shape else []
        if landing.num_parts > 1:
            if (
                tensor.ndim != len(shape)
                or tensor.shape[landing.dim] * landing.num_parts != shape[landing.dim]
            ):
                return False
            offsets[landing.dim] = landing.part * tensor.shape[landing.dim]
        self._write(name, tensor, landing.target, tuple(offsets), landing)
        return True

    def _write(
        self, name: str, tensor: torch.Tensor, target: str, offsets: Shape, landing: Landing | None = None
    ) -> None:
        layout, live = self._layouts[target], self._tensors[target]
        source = Box(offsets, tuple(tensor.shape))
        _check_fits(name, source, target, layout.shape, landing)
        for piece in layout.pieces:
            common = source.intersect(piece.box)
            if common is None:
                continue
            at = tuple(
                c - b + n for c, b, n in zip(common.offsets, piece.box.offsets, piece.local, strict=True)
            )
            begin = tuple(c - o for c, o in zip(common.offsets, offsets, strict=True))
            narrowed(live, Box(at, common.shape)).copy_(narrowed(tensor, Box(begin, common.shape)))


def narrowed(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return the view of `tensor` that is `box`."""
    for dim, (begin, extent) in enumerate(zip(box.offsets, box.shape, strict=True)):
        if extent != tensor.shape[dim]:
            tensor = tensor.narrow(dim, begin, extent)
    return tensor


def _check_fits(name: str, source: Box, target: str, shape: Shape, landing: Landing | None) -> None:
    """Refuse a tensor that is not exactly the part of the target that it stands for."""
    wanted = list(shape)
    if landing is not None and landing.item is not None and wanted:
        wanted[0] = 1
    if landing is not None and landing.num_parts > 1 and len(source.shape) == len(shape):
        wanted[landing.dim] = source.shape[landing.dim]
    inside = len(source.shape) == len(shape) and all(
        o + n <= s for o, n, s in zip(source.offsets, source.shape, shape, strict=True)
    )
    if source.shape != tuple(wanted) or not inside:
        message = (
            f"{name} with shape {source.shape} does not fit the model's {target} with shape {shape}; "
            "load a checkpoint of the same architecture"
        )
        raise ApplyError(message, name=name)


def loadable_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and persistent buffers, tied ones once, under their first name."""
    persistent = set(model.state_dict(keep_vars=True))
    yield from ((name, p) for name, p in model.named_parameters() if name in persistent)
    yield from ((name, b) for name, b in model.named_buffers() if name in persistent)
