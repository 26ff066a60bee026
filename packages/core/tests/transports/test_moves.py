"""Programs that run undisturbed write the same bytes as others, whatever mixture of rows they have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.errors import PlanError
from headrace.testing.copies import CopyRow, content, table_of
from headrace.transports.moves import PIECE_BYTES, Moves
from headrace.transports.program import CopyProgram

pytestmark = pytest.mark.timeout(60)

SIZE = 8 << 20


def rows(seed: int) -> list[CopyRow]:
    """Return rows with disjoint destinations: dense ones of all lengths, strided ones, casts, odd bytes."""
    random = np.random.default_rng(seed)
    found, begin = [], 0
    for kind in random.permutation(["dense", "odd", "strided", "cast", "long", "empty"] * 4):
        count = (
            int(random.integers(1, 3000)) if kind != "long" else int(random.integers(1, 5)) * PIECE_BYTES // 4
        )
        base = int(random.integers(0, 1 << 20)) * 2 + (kind == "odd")
        place = {"src_base": base, "dst_base": begin + (kind == "odd")}
        if kind == "strided":
            count = count // 16 * 16 + 16
            line = count // 8
            shape, strides = (16, count // 16), {"src_strides": (line + 64, 2), "dst_strides": (line, 2)}
            found.append(CopyRow(shape=shape, **strides, **place))
        elif kind == "cast":
            found.append(
                CopyRow(shape=(count,), src_strides=(2,), dst_strides=(4,), dst_dtype="float32", **place)
            )
        else:
            shape = (0 if kind == "empty" else count,)
            found.append(CopyRow(shape=shape, src_strides=(2,), dst_strides=(2,), **place))
        begin += 4 * count + 64
    return found


@pytest.mark.parametrize("seed", range(4))
def test_same_bytes_as_one_call(seed: int) -> None:
    source, table = content(seed, SIZE), table_of(rows(seed))
    one, other = torch.zeros(2 * SIZE, dtype=torch.uint8), torch.zeros(2 * SIZE, dtype=torch.uint8)
    CopyProgram(table, [source], [one]).run()
    program = CopyProgram(table, [source], [other], undisturbed=True)
    program.run()
    assert torch.equal(one, other)
    assert program.differences() == []
    assert one.any()


@pytest.mark.parametrize("seed", range(4))
def test_differences_name_the_same_rows(seed: int) -> None:
    source, table = content(seed, SIZE), table_of(rows(seed))
    block = torch.zeros(2 * SIZE, dtype=torch.uint8)
    plain, quick = (CopyProgram(table, [source], [block], undisturbed=u) for u in (False, True))
    quick.run()
    damaged = [i for i in range(0, len(table), 3) if table.num_elements[i]]
    for row in damaged:
        block[int(table.dst_base[row]) + int(table.num_elements[row])] += 64
    assert quick.differences() == plain.differences() == damaged


def test_a_difference_in_a_late_piece_is_found() -> None:
    source = content(1, 5 * PIECE_BYTES)
    target = source.clone()
    size = np.array([source.numel() - 3])
    moves = Moves(np.array([target.data_ptr()]), np.array([source.data_ptr()]), size)
    assert moves.differences() == []
    target[-4] ^= 1
    assert moves.differences() == [0]
    target[-2:] = 0
    moves.run()
    assert torch.equal(source[:-3], target[:-3])
    assert target[-2:].tolist() == [0, 0]


def test_rows_outside_their_memory_are_refused() -> None:
    table = table_of([CopyRow(shape=(60,), src_strides=(2,), dst_strides=(2,))])
    block = torch.zeros(128, dtype=torch.uint8)
    for source, target in ((block[:100], block), (block, block[:100])):
        with pytest.raises(PlanError, match="outside its memory"):
            CopyProgram(table, [source], [target], undisturbed=True)


def test_strided_live_tensors_keep_what_lies_between() -> None:
    whole = torch.zeros(50, 40, dtype=torch.bfloat16)
    live, source = whole[:, :8], content(2, 4096)
    row = CopyRow(shape=(50, 8), src_strides=(16, 2), dst_strides=(80, 2))
    CopyProgram(table_of([row]), [source], [live], undisturbed=True).run()
    assert live.contiguous().view(torch.uint8).numpy().tobytes() == source[:800].numpy().tobytes()
    assert not whole[:, 8:].any()
