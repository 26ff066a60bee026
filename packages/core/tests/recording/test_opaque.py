"""What fails closed: loaders that raise, live tensors that changed, and how far it spreads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from recording_layers import Decoder, Tp, decoder_sources, weight
from torch import nn

from headrace.errors import HeadraceError, ManifestMismatchError
from headrace.protocols import Skeleton
from headrace.recording import opaque_recipe, record, skeleton_of
from headrace.types import ParamMeta, ParamTable

Make = Callable[..., Any]


def load(module: Any, pairs: Any) -> object:
    return module.load_weights(pairs)


def opaque_names(recipe: Any) -> list[str]:
    return [recipe.sources[i].name for i in recipe.opaque]


class Picky(Decoder):
    """A decoder whose loader looks at the values of some sources."""

    looked_at: tuple[str, ...] = ()

    def _load_one(self, params: Any, name: str, loaded: torch.Tensor) -> str:
        if any(part in name for part in self.looked_at) and loaded.float().sum().item() == 12345:
            raise ValueError(name)
        return super()._load_one(params, name, loaded)


@pytest.mark.parametrize("layers", [1, 40])
def test_a_loader_that_raises_for_one_name_per_layer(make_bench: Make, layers: int) -> None:
    module = Picky(Tp(2, 1), layers)
    module.looked_at = ("k_proj.weight",)
    made = make_bench(module, load, decoder_sources(layers))
    leaves = [(i, leaf) for i in range(layers) for leaf in ("weight", "bias")]
    recipe = made.check(opaque=[f"layers.{i}.qkv_proj.{leaf}" for i, leaf in leaves])
    expected = {f"layers.{i}.{proj}_proj.{leaf}" for i, leaf in leaves for proj in "qkv"}
    assert set(opaque_names(recipe)) == expected
    assert any("k_proj" in why for why in recipe.opaque_reasons.values())


def test_a_loader_that_always_raises(make_bench: Make) -> None:
    def refuse(_: Any, pairs: Any) -> None:
        raise ValueError([name for name, _ in pairs])

    recipe = make_bench(Decoder(Tp()), refuse, decoder_sources()).record()
    assert len(recipe.opaque) == len(recipe.sources)
    assert not len(recipe.regions)
    assert set(recipe.opaque_reasons) == {meta.name for meta in recipe.targets}


def test_a_loader_that_raises_late_is_blamed_on_what_it_touched(make_bench: Make) -> None:
    module = nn.Module()
    module.a, module.b = weight(4), weight(4)

    def late(module: Any, pairs: Any) -> None:
        for name, loaded in reversed(list(pairs)):
            module.get_parameter(name).data.copy_(loaded)
            if name == "b":
                loaded.numpy()

    recipe = make_bench(module, late, {"a": (4,), "b": (4,)}, reload_unit=str).record()
    assert opaque_names(recipe) == ["b"]
    assert list(recipe.opaque_reasons) == ["b"]


def test_opaque_spreads_over_units_and_shared_sources(make_bench: Make) -> None:
    """x feeds u.a and v.a; u.b is opaque, so u, x, v and y go through the loader, and w does not."""
    module = nn.Module()
    for name in "uvw":
        part = nn.Module()
        part.a, part.b = weight(4), weight(4)
        setattr(module, name, part)

    def shared(module: Any, pairs: Any) -> None:
        for name, loaded in pairs:
            if name == "x":
                module.u.a.data.copy_(loaded)
                module.v.a.data.copy_(loaded)
            elif name == "u.b":
                module.u.b.data.copy_(loaded.float().exp())
            else:
                module.get_parameter(name).data.copy_(loaded)

    names = ("x", "u.b", "v.b", "w.a", "w.b")
    made = make_bench(module, shared, dict.fromkeys(names, (4,)))
    recipe = made.check(opaque=["u.a", "u.b", "v.a", "v.b"])
    assert opaque_names(recipe) == ["x", "u.b", "v.b"]
    assert recipe.opaque_reasons["u.a"] == "is reloaded with u.b"
    assert "exp" in recipe.opaque_reasons["u.b"]


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shape": lambda t: t.new_empty(0),
    "dtype": lambda t: t.to(torch.float8_e4m3fn),
    "strides": lambda t: t.t().contiguous().t(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_repacked_live_tensors_are_opaque(make_bench: Make, what: str) -> None:
    made = make_bench(Decoder(Tp(2, 0)), load, decoder_sources())
    name = "layers.1.gate_up_proj.weight"
    recipe = made.record(live={**made.live, name: CHANGES[what](made.live[name])})
    assert set(recipe.opaque_reasons) == {name, "layers.1.gate_up_proj.bias"}
    assert f"changed its {what}" in recipe.opaque_reasons[name]
    sources = ("layers.1.gate", "layers.1.up")
    assert set(opaque_names(recipe)) == {n for n in made.tensors if n.startswith(sources)}


def test_removed_and_new_live_tensors_are_opaque(make_bench: Make) -> None:
    made = make_bench(Decoder(Tp()), load, decoder_sources())
    live = made.live
    live["layers.0.o_proj.packed"] = live.pop("layers.0.o_proj.weight")
    recipe = made.record(live=live)
    assert list(recipe.opaque_reasons) == ["layers.0.o_proj.packed"]
    assert opaque_names(recipe) == ["layers.0.o_proj.weight"]


def test_live_ties_that_the_skeleton_does_not_have(make_bench: Make) -> None:
    made = make_bench(Decoder(Tp()), load, decoder_sources())
    live = {**made.live, "lm_head.weight": made.live["embed_tokens.weight"]}
    assert set(made.record(live=live).opaque_reasons) == {"lm_head.weight", "embed_tokens.weight"}


def test_a_tensor_that_the_loader_replaces(make_bench: Make) -> None:
    module = nn.Module()
    module.a, module.b = weight(4), weight(4)

    def replace(module: Any, pairs: Any) -> None:
        loaded = dict(pairs)
        module.a.data = loaded["a"]
        module.b.data.copy_(loaded["b"])

    recipe = make_bench(module, replace, {"a": (4,), "b": (4,)}, reload_unit=str).record()
    assert recipe.opaque_reasons == {"a": "the loader replaced the tensor"}
    assert opaque_names(recipe) == ["a"]


def test_a_source_that_the_loader_keeps_elsewhere(make_bench: Make) -> None:
    module = nn.Module()
    module.a = weight(4)
    module.kept = {}

    def keep(module: Any, pairs: Any) -> None:
        for name, loaded in pairs:
            if name == "a":
                module.a.data.copy_(loaded)
            if name == "kept":
                module.kept[name] = loaded.float() * 2
            if name == "checked":
                loaded.float().max()

    recipe = make_bench(module, keep, dict.fromkeys(("a", "kept", "checked"), (4,))).record()
    assert opaque_names(recipe) == ["kept"]
    assert [recipe.sources[i].name for i in recipe.unused] == ["checked"]


def test_a_loader_that_writes_to_live_tensors_changes_nothing(make_bench: Make) -> None:
    module = nn.Module()
    module.a = weight(4)
    module.b = weight(4)
    live = module.b

    def stray(module: Any, pairs: Any) -> None:
        for name, loaded in pairs:
            live.data.zero_()
            (live if name == "b" else module.a).data.copy_(loaded)
            module.b.data.copy_(loaded)

    recipe = make_bench(module, stray, {"a": (4,), "b": (4,)}, reload_unit=str).record()
    assert "b" in recipe.opaque_reasons
    assert bool((live == 7).all())


def test_a_loader_may_draw_random_numbers(make_bench: Make) -> None:
    module = nn.Module()
    module.a, module.b = weight(4), weight(4)

    def draw(module: Any, pairs: Any) -> None:
        for _, loaded in pairs:
            module.a.data.copy_(loaded)
        module.b.data.normal_()

    recipe = make_bench(module, draw, {"a": (4,)}, reload_unit=str).record()
    assert list(recipe.opaque_reasons) == ["b"]
    assert not len(recipe.opaque)


def test_opaque_recipe_names_everything(make_bench: Make) -> None:
    made = make_bench(Decoder(Tp()), load, decoder_sources())
    recipe = opaque_recipe(made.table, made.live)
    assert recipe.opaque.tolist() == list(range(len(made.tensors)))
    assert set(recipe.opaque_reasons) == set(made.live)
    assert not len(recipe.regions)
    assert not len(recipe.fills)


def test_a_loader_that_swallows_its_error(make_bench: Make) -> None:
    module = nn.Module()
    module.a, module.b = weight(4), weight(4)

    def swallow(module: Any, pairs: Any) -> None:
        for name, loaded in pairs:
            if name == "a":
                module.a.data.copy_(loaded)
                continue
            with contextlib.suppress(HeadraceError):
                module.b.data.fill_(float(loaded.max()))

    recipe = make_bench(module, swallow, {"b": (4,), "a": (4,)}, reload_unit=str).record()
    assert opaque_names(recipe) == ["b"]
    assert list(recipe.opaque_reasons) == ["b"]


@pytest.mark.parametrize("listed", ["embed_tokens.weight", "lm_head.weight"])
def test_ties_are_known_by_the_name_that_is_live(make_bench: Make, listed: str) -> None:
    made = make_bench(Decoder(Tp(), tied=True), load, decoder_sources())
    live = made.live
    live[listed] = live.pop("embed_tokens.weight")
    twin = skeleton_of(made.module)
    tensors = dict(twin.named_parameters(remove_duplicate=False))
    options = {"optional": lambda _: False, "derived": {}, "can_rederive": False}
    skeleton = Skeleton(tensors, twin.load_weights)
    recipe = record(skeleton, made.table, live=live, reload_unit=str, **options)
    assert [recipe.targets[b].name for b in recipe.regions.block].count(listed) == 1
    assert not recipe.opaque_reasons


def test_a_shape_that_the_loader_refuses_is_a_mismatch_and_not_opaque() -> None:
    module = nn.Linear(4, 3)
    twin = skeleton_of(module)

    def load(pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in pairs:
            assert twin.get_parameter(name).shape == tensor.shape
            twin.get_parameter(name).data.copy_(tensor)

    sources = ParamTable([ParamMeta("weight", "float32", (5, 4)), ParamMeta("bias", "float32", (7,))])
    with pytest.raises(ManifestMismatchError, match="2 tensors of the source do not fit") as caught:
        record(
            Skeleton(dict(twin.named_parameters()), load),
            sources,
            live=dict(module.named_parameters()),
            reload_unit=str,
            optional=lambda _name: False,
            derived={},
            can_rederive=True,
        )
    assert [line.split()[0] for line in caught.value.differences] == ["weight", "bias"]
