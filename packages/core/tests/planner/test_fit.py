"""Does the source fit the recipe, does the recipe fill its targets: everything that differs, at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import view

from headrace.errors import ManifestMismatchError
from headrace.geometry import Box, RegionTable, contiguous_strides
from headrace.planner import casts, check_fit, uncovered_targets
from headrace.recipe import FillTable, LoadRecipe
from headrace.testing.shapes import QWEN3_06B, params_of, tp_recipe
from headrace.types import ParamMeta, ParamTable

NONE = np.zeros(0, np.int32)


def recipe_of(
    sources: list[ParamMeta], targets: list[ParamMeta], rows: list[tuple[int, Box, int, int, tuple[int, ...]]]
) -> LoadRecipe:
    return LoadRecipe(
        ParamTable(sources),
        ParamTable(targets),
        RegionTable.from_rows(rows),
        FillTable.empty(),
        NONE,
        NONE,
        {},
    )


def test_all_differences_are_listed() -> None:
    sources = [
        ParamMeta("a", "bfloat16", (4,)),
        ParamMeta("b", "bfloat16", (4,)),
        ParamMeta("c", "int8", (4,)),
    ]
    targets = [ParamMeta(f"t{m.name}", "float32", (4,)) for m in sources]
    recipe = recipe_of(sources, targets, [(i, Box((0,), (4,)), i, 0, (4,)) for i in range(3)])
    offered = ParamTable([ParamMeta("b", "float16", (5,)), sources[2]])
    with pytest.raises(ManifestMismatchError) as caught:
        check_fit(recipe, offered)
    text = "\n".join(caught.value.differences)
    assert "a is missing" in text
    assert "b has shape (5,), the engine needs (4,)" in text
    assert "b is float16, the engine needs bfloat16" in text
    assert "c is int8, the engine's tc is float32" in text
    assert len(caught.value.differences) == 4


def test_unused_sources_may_be_missing_and_floats_are_cast() -> None:
    sources = [ParamMeta("a", "bfloat16", (4,)), ParamMeta("unused", "bfloat16", (4,))]
    recipe = recipe_of(sources, [ParamMeta("t", "float32", (4,))], [(0, Box((0,), (4,)), 0, 0, (4,))])
    check_fit(recipe, ParamTable([ParamMeta("more", "int8", (1,)), sources[0]]))
    assert casts(recipe) == ("bfloat16->float32 (1 tensor)",)
    assert casts(tp_recipe(params_of(QWEN3_06B), 2, 0)) == ()


def test_casts_count_tensors_not_boxes() -> None:
    sources = [ParamMeta("a", "bfloat16", (4,)), ParamMeta("b", "bfloat16", (2,))]
    rows = [
        (0, Box((0,), (2,)), 0, 0, (4,)),
        (0, Box((2,), (2,)), 0, 8, (4,)),
        (1, Box((0,), (2,)), 0, 16, (4,)),
    ]
    assert casts(recipe_of(sources, [ParamMeta("t", "float32", (6,))], rows)) == (
        "bfloat16->float32 (2 tensors)",
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_uncovered_targets_against_a_bitmap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 7, rng.integers(1, 4)))
    meta = ParamMeta("t", "float32", shape)
    strides = contiguous_strides(shape, 4)
    rows, bitmap = [], np.zeros(meta.num_bytes, np.uint8)
    for i in range(int(rng.integers(0, 5))):
        low = [0 if rng.random() < 0.6 else int(rng.integers(0, n)) for n in shape]
        extent = tuple(
            n - lo if rng.random() < 0.6 else int(rng.integers(0, n - lo + 1))
            for n, lo in zip(shape, low, strict=True)
        )
        base = sum(lo * s for lo, s in zip(low, strides, strict=True))
        rows.append((i, Box((0,) * len(shape), extent), 0, base, strides))
        if 0 not in extent:
            view(bitmap, base, extent, strides, np.float32).count()
    sources = [ParamMeta(f"s{i}", "float32", tuple(row[1].shape)) for i, row in enumerate(rows)]
    recipe = recipe_of(sources, [meta], rows)
    assert uncovered_targets(recipe) == ([] if bitmap.all() else ["t"])


def test_fills_count_and_exemptions_hold() -> None:
    targets = [ParamMeta(name, "float32", (4, 2)) for name in ("padded", "missing", "scale", "opaque")]
    rows = [(0, Box((0, 0), (3, 2)), 0, 0, (8, 4))]
    fills = FillTable(np.array([0], np.int32), np.array([6]), np.array([[2]]), np.array([[1]]), np.zeros(1))
    recipe = replace(
        recipe_of([ParamMeta("s", "float32", (3, 2))], targets, rows),
        fills=fills,
        opaque_reasons={"opaque": "packed"},
    )
    assert uncovered_targets(recipe, {"scale"}) == ["missing"]


def test_an_overlap_and_a_hole_of_one_size_are_found() -> None:
    sources = [ParamMeta(name, "float32", (2, 4)) for name in "ab"]
    rows = [(0, Box((0, 0), (2, 4)), 0, 0, (16, 4)), (1, Box((0, 0), (2, 4)), 0, 16, (16, 4))]
    assert uncovered_targets(recipe_of(sources, [ParamMeta("t", "float32", (4, 4))], rows)) == ["t"]


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_tensor_parallel_recipes_fill_everything(tp_size: int) -> None:
    params = params_of(QWEN3_06B)
    for rank in range(tp_size):
        recipe = tp_recipe(params, tp_size, rank, kv_heads=QWEN3_06B.kv_heads, tied=True)
        assert uncovered_targets(recipe) == []
        assert [params[i].name for i in recipe.unused.tolist()] == ["lm_head.weight"]
