"""A rank's shards as a source: under the conformance suite, cut into flat ranges and into boxes, cast on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.errors import ConfigError, HeadraceError
from headrace.geometry import Box
from headrace.protocols import SteppedSource, WeightSource
from headrace.testing.source_suite import SourceTests, SteppedSourceTests
from headrace_trainers.fence import StepFence
from headrace_trainers.shards import clean_name, shards_of
from headrace_trainers.shards.tensors import flat_pieces, meta_of
from headrace_trainers.source import Piece, Shards, ShardSource

SHAPES = {"a.weight": (7, 5, 3), "b.weight": (13,), "c": (), "d.weight": (3, 11)}


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class TestFlatRanges(SteppedSourceTests):
    """Three ranks with a third of every parameter's flat order each, as ZeRO-3 and FSDP1 have; in bfloat16."""

    def advance(self, source: WeightSource, change: Callable[[], None]) -> None:
        assert isinstance(source, ShardSource)
        source._fence.begin_write(30)
        change()
        source._fence.end_write()

    def make_sources(self, folder: Path) -> tuple[Sequence[WeightSource], Mapping[str, torch.Tensor]]:
        tensors = tensors_of(3)
        metas = tuple(meta_of(name, tensor) for name, tensor in tensors.items())
        sources = []
        for rank in range(3):
            pieces: list[Piece] = []
            for name, tensor in tensors.items():
                size = -(-tensor.numel() // 3)
                first, last = (min(r * size, tensor.numel()) for r in (rank, rank + 1))
                shard = tensor.flatten()[first:last].clone()
                pieces += flat_pieces(name, tuple(tensor.shape), first, last, lambda shard=shard: shard)
            sources.append(ShardSource(Shards(metas, tuple(pieces)), StepFence(), dtype="bfloat16"))
        return sources, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


class TestStridedBoxes(SourceTests):
    """Two ranks with columns of transposed memory."""

    def make_sources(self, folder: Path) -> tuple[Sequence[WeightSource], Mapping[str, torch.Tensor]]:
        whole = torch.randn(9, 6, generator=torch.Generator().manual_seed(4)).T
        meta = meta_of("w", whole)
        sources = []
        for begin, end in ((0, 4), (4, 9)):
            part = whole[:, begin:end]
            piece = Piece("w", Box((0, begin), (6, end - begin)), lambda part=part: part)
            sources.append(ShardSource(Shards((meta,), (piece,)), StepFence()))
        return sources, {"w": whole}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("made", torch.arange(2.0), persistent=False)


def test_a_model_has_every_name_and_its_persistent_buffers() -> None:
    shards = shards_of(nn.Sequential(Tied()))
    assert [meta.name for meta in shards.params] == ["0.embed.weight", "0.head.weight", "0.kept"]
    assert shards.pieces[0].local() is shards.pieces[1].local()


def test_names_can_be_mapped_and_left_out() -> None:
    shards = shards_of(Tied(), lambda name: None if name == "kept" else f"model.{name}")
    assert [piece.name for piece in shards.pieces] == ["model.embed.weight", "model.head.weight"]


@pytest.mark.parametrize(
    ("wrapped", "clean"),
    [
        ("module.model.norm.weight", "model.norm.weight"),
        ("module.module.w", "w"),
        ("_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up.weight", "model.layers.0.mlp.up.weight"),
        ("_fsdp_wrapped_module.model.layers.1._fsdp_wrapped_module.w", "model.layers.1.w"),
        ("module._orig_mod.model.module.w", "model.module.w"),
    ],
)
def test_names_are_cleaned(wrapped: str, clean: str) -> None:
    assert clean_name(wrapped) == clean


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when it compiles
def test_a_compiled_model_has_the_names_of_the_plain_one() -> None:
    shards = shards_of(torch.compile(nn.Linear(2, 3)))
    assert [meta.name for meta in shards.params] == ["weight", "bias"]


def test_what_cannot_be_published_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="weight has no dense data"):
        shards_of(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match="int8"):
        ShardSource(shards_of(nn.Linear(2, 2)), StepFence(), dtype="int8")


def test_two_parameters_of_one_name_are_refused() -> None:
    with pytest.raises(HeadraceError, match="twice"):
        ShardSource(shards_of(nn.Linear(2, 2), lambda _name: "same"), StepFence())


def test_it_is_a_stepped_source() -> None:
    assert isinstance(ShardSource(shards_of(nn.Linear(2, 2)), StepFence()), SteppedSource)


def test_steps_are_offered_with_room_after_failures() -> None:
    fence = StepFence(5)
    source = ShardSource(shards_of(nn.Linear(2, 2)), fence)
    assert [source.offer(attempt) for attempt in range(5)] == [5, 6, 7, 9, 13]
    fence.begin_write(0.0)
    assert source.offer(0) == 6
    fence.end()
    assert source.offer(0) == source.offer(3) == 5
