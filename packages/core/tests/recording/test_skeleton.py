"""Skeletons: the same structure, other memory, and nothing that leads back to the original."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from recording_layers import Decoder, Tp, weight
from torch import nn

from headrace.recording import skeleton_of


class Holder:
    """A plain object that refers to a module, as quantisation methods do."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Closing:
    """An object that must not exist twice."""

    closed = 0

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __del__(self) -> None:
        Closing.closed += 1


def test_every_parameter_is_on_meta_and_layouts_are_kept() -> None:
    module = Decoder(Tp(2, 1), experts=4, parallel=True, tied=True)
    twin = skeleton_of(module)
    assert type(twin) is Decoder
    pairs = dict(twin.named_parameters())
    for name, param in module.named_parameters():
        assert pairs[name].device.type == "meta"
        assert type(pairs[name]) is nn.Parameter
        assert (pairs[name].shape, pairs[name].stride(), pairs[name].dtype) == (
            param.shape, param.stride(), param.dtype
        )  # fmt: skip
    assert twin.lm_head.weight is twin.embed_tokens.weight
    assert module.embed_tokens.weight.device.type == "cpu"
    experts = twin.layers[0].experts
    assert experts.expert_map.tolist() == module.layers[0].experts.expert_map.tolist()
    assert experts.expert_map.data_ptr() != module.layers[0].experts.expert_map.data_ptr()


def test_loaders_of_the_twin_are_bound_to_the_twin() -> None:
    module = Decoder(Tp())
    twin = skeleton_of(module)
    assert twin.layers[0].o_proj.weight.weight_loader.__self__ is twin.layers[0].o_proj
    assert module.layers[0].o_proj.weight.weight_loader.__self__ is module.layers[0].o_proj


def test_what_refers_to_the_tree_follows_and_the_rest_is_shared() -> None:
    module: Any = nn.Module()
    module.layer = nn.Linear(2, 2)
    module.lock = threading.Lock()
    module.config = {"size": 2}
    module.by_name = {"layer": module.layer}
    module.holder = Holder(module.layer)
    module.holder.layer.back = module.holder
    module.partial = functools.partial(print, module.layer, end=module.layer.weight)
    module.closure = lambda: module.layer.weight
    module.cache = torch.zeros(4)
    twin = skeleton_of(module)
    assert twin.lock is module.lock
    assert twin.config is module.config
    assert twin.cache is module.cache
    assert twin.by_name["layer"] is twin.layer
    assert twin.holder.layer is twin.layer
    assert twin.layer.back is twin.holder
    assert twin.partial.args[0] is twin.layer
    assert twin.partial.keywords["end"] is twin.layer.weight
    assert twin.closure() is twin.layer.weight
    assert module.closure() is module.layer.weight


def test_objects_with_a_finalizer_are_shared() -> None:
    module: Any = nn.Module()
    module.layer = nn.Linear(2, 2)
    module.closing = Closing(module.layer)
    twin = skeleton_of(module)
    assert twin.closing is module.closing
    del twin
    assert Closing.closed == 0


class Custom(nn.Parameter):
    """A parameter class with a constructor of its own, as vLLM has them."""

    def __new__(cls, data: torch.Tensor, *, loader: object) -> Custom:
        return super().__new__(cls, data=data, requires_grad=False)

    def __init__(self, data: torch.Tensor, *, loader: object) -> None:
        self.loader = loader


def test_parameter_classes_and_attributes_are_kept() -> None:
    module: Any = nn.Module()
    module.part = nn.Module()
    module.part.w = Custom(torch.ones(3), loader=module.forward)
    module.part.w.output_dim = 0
    twin = skeleton_of(module)
    assert type(twin.part.w) is Custom
    assert twin.part.w.output_dim == 0
    assert twin.part.w.loader.__self__ is twin


def test_slices_of_one_buffer_are_separate_tensors() -> None:
    whole = torch.zeros(4, 4)
    module: Any = nn.Module()
    module.a = nn.Parameter(whole[:2], requires_grad=False)
    module.b = nn.Parameter(whole[2:], requires_grad=False)
    module.c = module.a
    module.d = weight(2)
    twin = skeleton_of(module)
    assert twin.a.untyped_storage()._cdata != twin.b.untyped_storage()._cdata
    assert twin.c is twin.a
