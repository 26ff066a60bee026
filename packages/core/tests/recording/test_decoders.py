"""Whole decoders under tensor and expert parallelism: a replayed recipe gives the loader's bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recording_layers import Decoder, PooledDecoder, Tp, decoder_sources

RANKS = [Tp(size, rank) for size in (1, 2, 4) for rank in range(size)]
tp_ranks = pytest.mark.parametrize("tp", RANKS, ids=lambda tp: f"{tp.rank}of{tp.size}")


def load(module: Any, pairs: Any) -> object:
    return module.load_weights(pairs)


@tp_ranks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_decoder(make_bench: Callable[..., Any], tp: Tp, dtype: torch.dtype) -> None:
    recipe = make_bench(Decoder(tp), load, decoder_sources(), dtype).check()
    unused = [recipe.sources[i].name for i in recipe.unused]
    names = {recipe.sources[i].name for i in recipe.regions.param}
    assert {"layers.0.rotary.inv_freq", "mtp.0.weight"} <= set(unused)
    assert names | set(unused) == {meta.name for meta in recipe.sources}
    assert not len(recipe.opaque)


@tp_ranks
@pytest.mark.parametrize("options", [{}, {"parallel": True}, {"transposed": True}], ids=["tp", "ep", "t"])
def test_expert_decoder(make_bench: Callable[..., Any], tp: Tp, options: dict[str, bool]) -> None:
    recipe = make_bench(Decoder(tp, experts=8, **options), load, decoder_sources(experts=8)).check()
    assert not len(recipe.opaque)


@tp_ranks
def test_tied_embeddings_keep_the_last_writer(make_bench: Callable[..., Any], tp: Tp) -> None:
    made = make_bench(Decoder(tp, tied=True), load, decoder_sources())
    recipe = made.check()
    assert recipe.targets.index_of("lm_head.weight") is None
    unused = [recipe.sources[i].name for i in recipe.unused]
    if tp.rank * 32 // tp.size < 30:
        assert "embed_tokens.weight" in unused


def test_loader_with_a_thread_pool(make_bench: Callable[..., Any]) -> None:
    make_bench(PooledDecoder(Tp(2, 1), experts=4), load, decoder_sources(experts=4, extra=False)).check()


def test_recipe_is_deterministic(make_bench: Callable[..., Any]) -> None:
    made = make_bench(Decoder(Tp(2, 0), experts=4), load, decoder_sources(experts=4))
    assert made.record().key == made.record().key
