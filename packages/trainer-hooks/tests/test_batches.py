"""Batches: whatever goes through however small a scratch comes out cast, in its place, and touches nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_trainers.batches import ALIGN, STRAIGHT_BYTES, Target, batches_of, form_of

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
POISON = 0xEE


def tensor_of(shape: Sequence[int], kind: torch.dtype, order: Sequence[int], seed: int) -> torch.Tensor:
    """Return random numbers whose memory has the dims in another order."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn([shape[dim] for dim in order], generator=generator).to(kind)
    return made.permute([order.index(dim) for dim in range(len(shape))])


def expected(tensor: torch.Tensor, kind: torch.dtype) -> list[int]:
    return tensor.contiguous().to(kind).view(-1).view(torch.uint8).tolist()


def place(sizes: Sequence[int], gaps: Sequence[int]) -> tuple[list[int], int]:
    """Return where tensors of these sizes begin, each so many slots behind the last, and the size of all."""
    begins, at = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        begins.append(at + gap * ALIGN)
        at = -(-(begins[-1] + size) // ALIGN) * ALIGN
    return begins, at + ALIGN


@st.composite
def tensors(draw: st.DrawFn) -> tuple[torch.Tensor, torch.dtype, int, int]:
    shape = draw(st.lists(st.integers(1, 7), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    kind = draw(st.sampled_from((*KINDS, torch.int64)))
    into = kind if kind == torch.int64 else draw(st.sampled_from(KINDS))
    made = tensor_of(shape, kind, order, draw(st.integers(0, 99)))
    return made, into, draw(st.integers(0, 2)), draw(st.integers(0, 1))


@settings(max_examples=150)
@given(chosen=st.lists(tensors(), min_size=1, max_size=12), scratch_bytes=st.sampled_from((64, 192, 1024, 1 << 16)))
def test_every_byte_is_in_its_place(
    chosen: list[tuple[torch.Tensor, torch.dtype, int, int]], scratch_bytes: int
) -> None:
    targets: list[Target | None] = [None] * len(chosen)
    sizes = []
    for segment in (0, 1):
        own = [i for i, one in enumerate(chosen) if one[3] == segment]
        begins, size = place(
            [chosen[i][0].numel() * chosen[i][1].itemsize for i in own], [chosen[i][2] for i in own]
        )
        sizes.append(size)
        for i, begin in zip(own, begins, strict=True):
            targets[i] = Target(chosen[i][1], segment, begin)
    found = [torch.full((size,), POISON, dtype=torch.uint8) for size in sizes]
    places = [target for target in targets if target is not None]
    scratches = [torch.zeros(scratch_bytes, dtype=torch.uint8) for _ in range(2)]
    given_tensors = [one[0] for one in chosen]
    for batch in batches_of([form_of(t) for t in given_tensors], places, scratches):
        batch.run(given_tensors, found)
    for tensor, target in zip(given_tensors, places, strict=True):
        size = tensor.numel() * target.dtype.itemsize
        own = found[target.segment][target.begin : target.begin + size]
        assert own.tolist() == expected(tensor, target.dtype)
        own.fill_(POISON)
        behind = -(-(target.begin + size) // ALIGN) * ALIGN
        found[target.segment][target.begin + size : behind] = POISON  # padding may hold anything
    assert all((segment == POISON).all() for segment in found)


def test_many_small_tensors_leave_together() -> None:
    """A thousand neighbours are gathered by one call, and leave in one copy."""
    count, kind = 1000, torch.bfloat16
    small = [torch.full((24,), float(i)) for i in range(count)]
    targets = [Target(kind, 0, i * ALIGN) for i in range(count)]
    (batch,) = batches_of([form_of(t) for t in small], targets, [torch.zeros(1 << 20, dtype=torch.uint8)])
    assert len(batch._runs) == 1
    assert len(batch._together) == 1
    assert not batch._alone


def test_batches_take_turns_with_the_scratches() -> None:
    scratches = [torch.zeros(4096, dtype=torch.uint8) for _ in range(2)]
    large = torch.randn(10_000)
    found = batches_of([form_of(large)], [Target(torch.bfloat16, 0, 0)], scratches)
    assert len(found) == 5
    assert all(batch.scratch is scratches[number % 2] for number, batch in enumerate(found))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8])
def test_large_dense_tensors_of_the_right_dtype_need_no_scratch(kind: torch.dtype) -> None:
    large = torch.randint(0, 100, (STRAIGHT_BYTES + 6,)).to(kind)
    segment = torch.zeros(large.nbytes, dtype=torch.uint8)
    scratch = torch.full((128,), POISON, dtype=torch.uint8)
    for batch in batches_of([form_of(large)], [Target(kind, 0, 0)], [scratch]):
        batch.run([large], [segment])
    assert torch.equal(segment, large.view(torch.uint8))
    assert (scratch == POISON).all()


def test_weights_that_require_gradients_are_read_like_others() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 3))
    segment = torch.zeros(64, dtype=torch.uint8)
    scratch = torch.zeros(64, dtype=torch.uint8)
    with torch.no_grad():
        for batch in batches_of([form_of(weight)], [Target(torch.bfloat16, 0, 0)], [scratch]):
            batch.run([weight], [segment])
    assert segment[:30].tolist() == expected(weight.detach(), torch.bfloat16)
    assert not segment.requires_grad
