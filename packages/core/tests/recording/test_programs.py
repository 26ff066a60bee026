"""Random loaders: views, casts, temporaries and overlapping writes, against really running them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recording_layers import weight
from torch import nn

from headrace.planner import uncovered_targets
from headrace.recording import prove

NUM_SOURCES = 4


def shape_of(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.choice((1, 2, 3, 4, 6)) for _ in range(rng.randint(1, 3)))


def cut(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Take a random box, sometimes every second index, of a tensor."""
    index = []
    for extent in tensor.shape:
        begin = rng.randrange(extent)
        index.append(slice(begin, rng.randint(begin + 1, extent), rng.choice((1, 1, 2))))
    return tensor[tuple(index)]


def change(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Apply a random step of the kinds that loaders use."""
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: cut(rng, tensor),
        lambda: tensor.permute(rng.sample(range(tensor.dim()), tensor.dim())),
        tensor.clone,
        tensor.contiguous,
        tensor.flatten,
        lambda: tensor.unsqueeze(rng.randint(0, tensor.dim())),
        tensor.float,
        lambda: torch.cat([tensor[-1:], tensor]),
        lambda: torch.stack([tensor, tensor], dim=rng.randint(0, tensor.dim())),
        lambda: tensor.unflatten(0, (tensor.shape[0] // 2, 2)) if tensor.shape[0] % 2 == 0 else tensor,
        lambda: nn.functional.pad(tensor, (rng.randint(0, 2), 1), value=1.5),
        lambda: tensor.expand(2, *tensor.shape),
    ]
    return rng.choice(ways)()


def write(rng: random.Random, target: torch.Tensor, found: torch.Tensor) -> None:
    """Copy as much as fits of `found` into a random part of the target."""
    into = cut(rng, target)
    if rng.random() < 0.2:
        into.fill_(rng.choice((0.0, 1.0, -2.5)))
        return
    while found.dim() > into.dim():
        found = found.flatten(0, 1)
    while found.dim() < into.dim():
        found = found.unsqueeze(0)
    sizes = [min(a, b) for a, b in zip(into.shape, found.shape, strict=True)]
    box = tuple(slice(0, size) for size in sizes)
    into[box].copy_(found[box])


def permuted(rng: random.Random, data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data.permute(rng.sample(range(data.dim()), data.dim())), requires_grad=False)


def program(seed: int) -> Callable[[Any, Any], None]:
    def load(module: Any, pairs: Any) -> None:
        rng = random.Random(seed)
        loaded = [tensor for _, tensor in pairs]
        for _ in range(rng.randint(1, 6)):
            found = rng.choice(loaded)
            for _ in range(rng.randint(0, 4)):
                found = change(rng, found) if found.numel() < 500 else found
            write(rng, rng.choice((module.a, module.b)).data, found)

    return load


@pytest.mark.parametrize("block", range(8))
def test_random_loaders(make_bench: Callable[..., Any], block: int) -> None:
    followed = 0
    for seed in range(block * 25, block * 25 + 25):
        rng = random.Random(seed)
        module = nn.Module()
        module.a = weight(*shape_of(rng), dtype=rng.choice((torch.float32, torch.bfloat16)))
        module.b = permuted(rng, torch.zeros(shape_of(rng), dtype=torch.bfloat16))
        shapes = {f"x{i}": shape_of(rng) for i in range(NUM_SOURCES)}
        made = make_bench(module, program(seed), shapes, reload_unit=str, optional=lambda _: True)
        recipe = made.record()
        for tensor in made.live.values():
            tensor.data.fill_(99)
        expected = made.load_really()
        got = made.replay(recipe)
        trusted = [name for name in expected if name not in recipe.opaque_reasons]
        assert {n: got[n] for n in trusted} == {n: expected[n] for n in trusted}, seed
        proven = prove(recipe, made.live, made.tensors.__getitem__, reload_unit=str)
        assert proven.opaque_reasons == recipe.opaque_reasons
        uncovered = set(uncovered_targets(recipe))
        assert uncovered == {n for n in trusted if bool((made.live[n] == 99).any())}, seed
        followed += len(trusted)
    assert followed > 40
