"""Single things that loaders do: each is followed to the byte, or fails closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recording_layers import weight
from torch import nn

from headrace.errors import UncoveredRegionError
from headrace.recipe import LoadRecipe

Make = Callable[..., Any]
Params = dict[str, torch.Tensor]
H, R = 6, 8


def one_target(*shape: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    module = nn.Module()
    module.w = weight(*shape, dtype=dtype)
    module.other = weight(3)
    return module


def loader(**ways: Callable[[torch.Tensor, dict[str, torch.Tensor]], object]) -> Callable[[Any, Any], None]:
    """Return a loader that calls `ways[name](parameter data, all loaded tensors)` once all have come."""

    def load(module: Any, pairs: Any) -> None:
        loaded = dict(pairs)
        module.other.data.copy_(loaded["other"])
        for name, way in ways.items() if "x0" in loaded else ():
            way(getattr(module, name).data, loaded)

    return load


def stack_of(count: int, *shape: int) -> dict[str, tuple[int, ...]]:
    return {"other": (3,), **{f"x{i}": shape for i in range(count)}}


def cat_of_permuted(w: torch.Tensor, x: Params) -> None:
    w.copy_(torch.cat([x[f"x{i}"].t().contiguous() for i in range(3)]))


def interleaved(w: torch.Tensor, x: Params) -> None:
    for part in range(3):
        w[part].copy_(x["x0"].view(4, 3, 2, H)[:, part].reshape(8, H))


def rotary_permute(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"].view(2, 2, 2, H).transpose(1, 2).reshape(8, H))


def padded(w: torch.Tensor, x: Params) -> None:
    w.copy_(nn.functional.pad(x["x0"], (1, 1, 0, 2), value=0.5))


def zeros_then_part(w: torch.Tensor, x: Params) -> None:
    whole = torch.zeros(R, H, dtype=w.dtype)
    whole[2:5] = x["x0"]
    w.copy_(whole)


def empty_on_meta(w: torch.Tensor, x: Params) -> None:
    whole = x["x0"].new_empty(2 * R, H)
    whole[:R], whole[R:] = x["x1"], x["x0"]
    w.copy_(whole)


def stacked_transposed(w: torch.Tensor, x: Params) -> None:
    w.copy_(torch.stack([x[f"x{i}"] for i in range(4)]).transpose(1, 2))


def twice(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"])
    w[2:4, 1:3].copy_(x["x1"][2:4, 1:3])
    w[3].fill_(2.5)
    w[3, 4:].copy_(x["x1"][0, :2])


def zero_then_part(w: torch.Tensor, x: Params) -> None:
    w.zero_()
    w[1:5, 2:].copy_(x["x0"][:4, 2:])


def from_target(w: torch.Tensor, x: Params) -> None:
    w[:4].copy_(x["x0"][:4])
    w[4:].copy_(w[:4])


def by_setitem(w: torch.Tensor, x: Params) -> None:
    for i in range(R):
        w[i] = x["x0"][R - 1 - i]


def broadcast(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"])


def repeated_heads(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"].unflatten(0, (2, 2)).repeat_interleave(2, dim=0).flatten(0, 1))


def flat_piece(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"].flatten()[4:17])


def moved(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"].to("cpu").contiguous().clone(), non_blocking=True)


def foreach(w: torch.Tensor, x: Params) -> None:
    torch._foreach_copy_([w[:4], w[4:]], [x["x0"][4:], x["x1"][4:]])


def chunks(w: torch.Tensor, x: Params) -> None:
    for part, row in zip(x["x0"].chunk(4), w.unbind(0)[::-1], strict=False):
        row.copy_(part[1])
    for i, row in enumerate(x["x1"].split(1)[:4]):
        w[i] = row.squeeze_(0)


FOLLOWED: list[tuple[Callable[[torch.Tensor, Params], object], tuple[int, ...], dict[str, Any]]] = [
    (cat_of_permuted, (3 * H, R), stack_of(3, R, H)),
    (interleaved, (3, 8, H), stack_of(1, 24, H)),
    (rotary_permute, (8, H), stack_of(1, 8, H)),
    (padded, (R + 2, H + 2), stack_of(1, R, H)),
    (zeros_then_part, (R, H), stack_of(1, 3, H)),
    (empty_on_meta, (2 * R, H), stack_of(2, R, H)),
    (stacked_transposed, (4, H, R), stack_of(4, R, H)),
    (twice, (R, H), stack_of(2, R, H)),
    (zero_then_part, (R, H), stack_of(1, R, H)),
    (from_target, (R, H), stack_of(1, R, H)),
    (by_setitem, (R, H), stack_of(1, R, H)),
    (broadcast, (R,), stack_of(1)),
    (broadcast, (R, H), stack_of(1, R, 1)),
    (broadcast, (R, H), stack_of(1, H)),
    (broadcast, (1,), stack_of(1)),
    (repeated_heads, (8, H), stack_of(1, 4, H)),
    (flat_piece, (13,), stack_of(1, R, H)),
    (moved, (R, H), stack_of(1, R, H)),
    (foreach, (R, H), stack_of(2, R, H)),
    (chunks, (R, H), stack_of(2, R, H)),
]


@pytest.mark.parametrize(("way", "shape", "sources"), FOLLOWED, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_followed(make_bench: Make, way: Any, shape: Any, sources: Any, dtype: torch.dtype) -> None:
    recipe = make_bench(one_target(*shape), loader(w=way), sources, dtype).check()
    assert not len(recipe.opaque)


@pytest.mark.parametrize(("way", "shape", "sources"), FOLLOWED, ids=lambda v: getattr(v, "__name__", ""))
def test_followed_in_inference_mode(make_bench: Make, way: Any, shape: Any, sources: Any) -> None:
    made = make_bench(one_target(*shape), loader(w=way), sources, torch.float32)
    with torch.inference_mode():
        recipe = made.record()
    assert not len(recipe.opaque)
    assert {meta.name for meta in recipe.sources} - {recipe.sources[int(i)].name for i in recipe.unused} == set(sources)


def state_space(w: torch.Tensor, x: Params) -> None:
    w.copy_(-torch.exp(x["x0"].float()))


def arithmetic_in_place(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"])
    w.mul_(2)


def indexed(w: torch.Tensor, x: Params) -> None:
    w[torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])] = x["x0"]


def gathered(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"][torch.arange(R - 1, -1, -1)])


def flipped(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"].flip(0))


def input_changed(w: torch.Tensor, x: Params) -> None:
    x["x0"].mul_(2)
    w.copy_(x["x0"])


def looks_at_values(w: torch.Tensor, x: Params) -> None:
    if bool(x["x0"].max() > 0):
        w.copy_(x["x0"])
    else:
        w.zero_()


def double_rounding(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"].to(torch.float16))


def narrowed_and_widened(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"].to(torch.bfloat16).float().to(torch.float16))


def bits(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"].view(torch.int16).to(w.dtype))


def scaled_item(w: torch.Tensor, x: Params) -> None:
    w.fill_(x["x0"][0, 0].item() * 2)


def branch_on_item(w: torch.Tensor, x: Params) -> None:
    value = x["x0"][0, 0].item()
    w.fill_(value if value > 0 else 0.0)


def partly_unknown(w: torch.Tensor, x: Params) -> None:
    temporary = torch.empty_like(w)
    temporary[:4] = x["x0"][:4]
    temporary[4:] = torch.ones(4, H, dtype=w.dtype) * x["x0"][4:]
    w.copy_(temporary)


def real_constants(w: torch.Tensor, x: Params) -> None:
    w.copy_(x["x0"] + torch.arange(H, dtype=w.dtype))


CLOSED = [
    (state_space, torch.bfloat16),
    (arithmetic_in_place, torch.bfloat16),
    (indexed, torch.bfloat16),
    (gathered, torch.bfloat16),
    (flipped, torch.bfloat16),
    (input_changed, torch.bfloat16),
    (looks_at_values, torch.bfloat16),
    (double_rounding, torch.float32),
    (narrowed_and_widened, torch.float32),
    (bits, torch.bfloat16),
    (scaled_item, torch.bfloat16),
    (branch_on_item, torch.bfloat16),
    (partly_unknown, torch.bfloat16),
    (real_constants, torch.bfloat16),
]


@pytest.mark.parametrize(("way", "dtype"), CLOSED, ids=lambda v: getattr(v, "__name__", ""))
def test_fails_closed(make_bench: Make, way: Any, dtype: torch.dtype) -> None:
    made = make_bench(one_target(R, H), loader(w=way), stack_of(1, R, H), dtype, reload_unit=str)
    recipe = made.check(opaque=["w"])
    assert [recipe.sources[i].name for i in recipe.opaque] == ["x0"]
    assert {recipe.targets[i].name for i in recipe.regions.block} == {"other"}
    assert not len(recipe.fills)


def test_unused_sources_are_loaded_where_a_target_has_no_known_source(make_bench: Make) -> None:
    def load(w: torch.Tensor, x: Params) -> None:
        hidden = torch.empty(R, H)
        hidden.uniform_()
        w.copy_(hidden)

    recipe = make_bench(one_target(R, H), loader(w=load), stack_of(1, R, H), reload_unit=str).record()
    assert "x0" in {recipe.sources[int(i)].name for i in recipe.opaque}
    assert not len(recipe.unused)


def test_scalar_by_item_is_a_copy(make_bench: Make) -> None:
    recipe = make_bench(one_target(1), loader(w=lambda w, x: w.fill_(x["x0"].item())), stack_of(1)).check()
    assert not len(recipe.opaque)


def test_exact_widening_is_followed(make_bench: Make) -> None:
    way = loader(w=lambda w, x: w.copy_(x["x0"].float().double().contiguous()))
    assert not len(make_bench(one_target(R, H), way, stack_of(1, R, H)).check().opaque)


def test_rounding_to_the_final_dtype_is_followed(make_bench: Make) -> None:
    way = loader(w=lambda w, x: w.copy_(torch.cat([x["x0"].to(w.dtype), x["x1"].to(w.dtype)])))
    assert not len(make_bench(one_target(2 * R, H), way, stack_of(2, R, H), torch.float32).check().opaque)


def test_equal_views_of_bits_are_followed(make_bench: Make) -> None:
    def way(w: torch.Tensor, x: Params) -> None:
        w.view(torch.uint8).copy_(x["x0"].view(torch.uint8))

    shapes = {"other": (3,), "x0": torch.randn(R, H).to(torch.float8_e4m3fn)}
    made = make_bench(one_target(R, H, dtype=torch.float8_e4m3fn), loader(w=way), shapes)
    recipe = made.record()
    assert not len(recipe.opaque)
    assert recipe.regions.num_elements.sum() == R * H + 3


def test_integers_are_not_cast_by_recipe(make_bench: Make) -> None:
    shapes = {"other": (3,), "x0": torch.arange(R)}
    module = one_target(R, dtype=torch.int32)
    way = loader(w=lambda w, x: w.copy_(x["x0"]))
    recipe = make_bench(module, way, shapes, reload_unit=str).check(opaque=["w"])
    assert "int64" in recipe.opaque_reasons["w"]


@pytest.mark.parametrize("transposed", [False, True])
def test_one_source_with_all_experts(make_bench: Make, transposed: bool) -> None:
    module = nn.Module()
    for i in range(4):
        module.register_parameter(f"e{i}", weight(R, H))

    def load(module: Any, pairs: Any) -> None:
        for _, loaded in pairs:
            for i, expert in enumerate(loaded):
                module.get_parameter(f"e{i}").data.copy_(expert.t() if transposed else expert)

    recipe = make_bench(module, load, {"experts": (4, H, R) if transposed else (4, R, H)}).check()
    assert len(recipe.regions) == 4


def test_many_parts_stay_quick_and_exact(make_bench: Make) -> None:
    """A temporary of many pieces, read in many parts."""

    def way(w: torch.Tensor, x: Params) -> None:
        joined = torch.stack([x[f"x{i}"] for i in range(60)])
        for i in range(60):
            w[i].copy_(joined[59 - i].t())

    make_bench(one_target(60, H, R), loader(w=way), stack_of(60, R, H)).check()


def test_live_strides_are_kept(make_bench: Make) -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(H, R, dtype=torch.bfloat16).t(), requires_grad=False)
    module.padded = nn.Parameter(torch.zeros(R, 16, dtype=torch.bfloat16)[:, 2:8], requires_grad=False)

    def load(module: Any, pairs: Any) -> None:
        for name, loaded in pairs:
            module.get_parameter(name).data.copy_(loaded)

    recipe = make_bench(module, load, {"w": (R, H), "padded": (R, H)}).check()
    assert sorted(recipe.regions.strides.tolist()) == sorted([[2, 16], [32, 2]])


def uncovered(make_bench: Make, **options: Any) -> LoadRecipe:
    module = one_target(R, H)
    module.scale = weight(1)
    way = loader(w=lambda w, x: w[:3].copy_(x["x0"][:3]))
    return make_bench(module, way, stack_of(1, R, H), **options).record()


def test_uncovered_targets_are_all_named(make_bench: Make) -> None:
    with pytest.raises(UncoveredRegionError, match=r"w lacks 30 of 48 .* x0\); scale lacks 1 of 1") as caught:
        uncovered(make_bench)
    assert caught.value.phase == "record"


def test_optional_targets_may_stay(make_bench: Make) -> None:
    recipe = uncovered(make_bench, optional=lambda name: name in ("w", "scale"))
    assert not recipe.opaque_reasons


def test_optional_targets_without_a_source_are_left(make_bench: Make) -> None:
    module = one_target(R, H)
    module.draft, module.scale = weight(R, H), weight(1)
    way = loader(w=lambda w, x: w.copy_(x["x0"]))
    recipe = make_bench(module, way, stack_of(1, R, H), reload_unit=str, optional=lambda name: name != "w").record()
    assert recipe.left == ("draft",)


def test_derived_targets_are_not_covered_by_sources(make_bench: Make) -> None:
    with pytest.raises(UncoveredRegionError, match="1 live tensors"):
        uncovered(make_bench, derived={"scale": ["other"]}, can_rederive=True)


@pytest.mark.parametrize("can_rederive", [True, False])
def test_inputs_of_derived_tensors(make_bench: Make, can_rederive: bool) -> None:
    way = loader(w=lambda w, x: w.copy_(x["x0"]))
    options = {"derived": {"w_kc": ["w"]}, "can_rederive": can_rederive}
    made = make_bench(one_target(R, H), way, stack_of(1, R, H), reload_unit=str, **options)
    recipe = made.check(opaque=[] if can_rederive else ["w"])
    assert len(recipe.opaque) == (0 if can_rederive else 1)
