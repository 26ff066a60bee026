"""Sums on a GPU are those of the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.digests import digest
from headrace.planner.digest_tables import receiver_digests
from headrace.testing import shapes

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(120)]

SMALL = shapes.ModelShape(
    layers=2, hidden=192, vocab=1000, heads=4, kv_heads=2, head_dim=48, intermediate=328,
    experts=6, expert_intermediate=72,
)  # fmt: skip


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
def test_equal_sums_on_both_sides(tp_size: int, dtype: str) -> None:
    params = shapes.params_of(shapes.ModelShape(**{**vars_of(SMALL), "dtype": dtype}))
    recipe = shapes.tp_recipe(params, tp_size, 0, kv_heads=2)
    table = receiver_digests(recipe)
    blocks = [torch.randint(0, 256, (int(size),), dtype=torch.uint8) for size in recipe.targets.num_bytes]
    here = digest(table, blocks, num_groups=len(blocks))
    there = digest(table, [block.cuda() for block in blocks], num_groups=len(blocks))
    assert (here == there).all()
    blocks[3][17] ^= 1
    changed = digest(table, [block.cuda() for block in blocks], num_groups=len(blocks))
    assert np.flatnonzero(changed != here).tolist() == [3]


def vars_of(shape: shapes.ModelShape) -> dict[str, object]:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}
