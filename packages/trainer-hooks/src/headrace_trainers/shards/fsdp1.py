"""Pieces of FSDP1: ranges of flat parameters, whatever the sharding strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp

from headrace.types import ParamMeta
from headrace_trainers.shards.names import clean_name
from headrace_trainers.shards.tensors import flat_pieces, meta_of
from headrace_trainers.source import Piece


def fsdp1_pieces(model: nn.Module) -> Iterator[tuple[ParamMeta, list[Piece]]]:
    """Yield every parameter that a flat parameter of `model` manages, and what of it lies here.

    Each name of a shared parameter is yielded. Works from before the first forward on, and while parameters are
    gathered for a forward: the rank's own shard stays where it is.
    """
    prefixes = {id(module): name for name, module in model.named_modules()}
    for unit in Fsdp.fsdp_modules(model):
        handle: Any = unit._handle
        if handle is not None:
            yield from _of_handle(handle, prefixes)


def _of_handle(handle: Any, prefixes: dict[int, str]) -> Iterator[tuple[ParamMeta, list[Piece]]]:  # noqa: ANN401
    flat = handle.flat_param
    found: dict[str, tuple[ParamMeta, list[Piece]]] = {}
    infos = zip(flat._param_infos, flat._shapes, flat._shard_param_infos, strict=True)
    for (local_name, module, _), shape, place in infos:
        name = _full_name(prefixes, module, local_name)
        pieces: list[Piece] = []
        if place.in_shard:
            first, last = place.intra_param_start_idx, place.intra_param_end_idx + 1
            window = _window(flat, place.offset_in_shard, place.numel_in_shard)
            pieces = flat_pieces(name, tuple(shape), first, last, window)
        found[name] = (meta_of(name, _shard(flat), tuple(shape)), pieces)
    yield from found.values()
    for local_name, module, _, owner_name, owner, _ in flat._shared_param_infos:
        meta, pieces = found[_full_name(prefixes, owner, owner_name)]
        alias = _full_name(prefixes, module, local_name)
        yield ParamMeta(alias, meta.dtype, meta.shape), [Piece(alias, p.box, p.local) for p in pieces]


def _window(flat: Any, begin: int, count: int) -> Callable[[], torch.Tensor]:  # noqa: ANN401 - a FlatParameter
    return lambda: _shard(flat)[begin : begin + count]


def _shard(flat: Any) -> torch.Tensor:  # noqa: ANN401
    """Return the rank's own part. `_local_shard` appears with the first forward; until then it is the parameter."""
    shard: torch.Tensor = getattr(flat, "_local_shard", flat.data)
    return shard


def _full_name(prefixes: dict[int, str], module: nn.Module, local_name: str) -> str:
    prefix = prefixes[id(module)]
    return clean_name(f"{prefix}.{local_name}" if prefix else local_name)
