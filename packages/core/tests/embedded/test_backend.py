"""TorchBackend in one process: its loader writes what `from_pretrained` would, through views where it can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from headrace.embedded.backend import TorchBackend
from headrace.embedded.model import own_memory
from headrace.errors import ApplyError
from headrace.protocols import InferenceBackend
from headrace.types import WorkerId

KINDS = ("qwen3", "llama", "qwen3_moe", "tied")


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers_logging.disable_progress_bar()


def load_model(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False)
    own_memory(model)
    return model


def pairs_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a mapping
                yield name, reader.get_tensor(name)


def backend_of(model: PreTrainedModel) -> TorchBackend:
    return TorchBackend(model, WorkerId("test", 0))


def contents(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        name: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_load_writes_what_from_pretrained_does(checkpoints: dict[str, Path], kind: str) -> None:
    backend = backend_of(load_model(checkpoints[kind]))
    wanted = contents(backend.live_tensors())
    with torch.no_grad():
        for tensor in backend.live_tensors().values():
            tensor.zero_()
    backend.load(reversed(list(pairs_of(checkpoints[kind]))))
    assert contents(backend.live_tensors()) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_skeleton_has_the_layout_and_a_loader_that_touches_nothing_live(
    checkpoints: dict[str, Path], kind: str
) -> None:
    backend = backend_of(load_model(checkpoints[kind]))
    before = contents(backend.live_tensors())
    skeleton = backend.skeleton()
    assert {n: (t.shape, t.dtype, t.stride()) for n, t in skeleton.tensors.items()} == {
        n: (t.shape, t.dtype, t.stride()) for n, t in backend.live_tensors().items()
    }
    assert all(tensor.is_meta for tensor in skeleton.tensors.values())
    skeleton.load((name, tensor.to("meta")) for name, tensor in pairs_of(checkpoints[kind]))
    assert contents(backend.live_tensors()) == before


def test_it_is_an_inference_backend(checkpoints: dict[str, Path]) -> None:
    backend = TorchBackend(
        load_model(checkpoints["qwen3"]), WorkerId("test", 0), source=str(checkpoints["qwen3"]), version=0
    )
    assert isinstance(backend, InferenceBackend)
    assert backend.free_memory_bytes() > 0
    assert backend.rederive([])
    assert backend.reload_unit("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj"
    assert backend.loaded_from() == str(checkpoints["qwen3"])
    assert set(backend.live_tensors()) == {name for name, _ in pairs_of(checkpoints["qwen3"])}


def test_epoch_is_odd_inside_a_commit_also_when_it_fails(checkpoints: dict[str, Path]) -> None:
    backend = TorchBackend(
        load_model(checkpoints["qwen3"]), WorkerId("test", 0), source="somewhere", version=3
    )
    assert backend.seen.settled
    inside = []
    with suppress(KeyError), backend.commit_scope():
        inside.append(backend.seen.settled)
        raise KeyError
    assert inside == [False]
    assert (backend.seen.version, backend.seen.epoch) == (3, 2)
    assert backend.loaded_from() is None
    backend.set_version(4)
    assert backend.seen.version == 4


def test_live_tensors_take_writes_inside_inference_mode(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["qwen3"])
    backend = backend_of(model)
    with torch.inference_mode():
        before = model(torch.tensor([[5, 6]])).logits
        with backend.commit_scope():
            backend.load(pairs_of(checkpoints["other"]))
        after = model(torch.tensor([[5, 6]])).logits
        wanted = load_model(checkpoints["other"])(torch.tensor([[5, 6]])).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, wanted)


def test_names_of_the_base_model_land_too(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["qwen3"])
    wanted = contents(backend_of(load_model(checkpoints["other"])).live_tensors())
    backend = backend_of(model)
    backend.load((name.removeprefix("model."), tensor) for name, tensor in pairs_of(checkpoints["other"]))
    assert contents(backend.live_tensors()) == wanted


def test_unknown_names_and_a_tied_head_are_ignored(checkpoints: dict[str, Path]) -> None:
    backend = backend_of(load_model(checkpoints["tied"]))
    before = contents(backend.live_tensors())
    embedding = backend.live_tensors()["model.embed_tokens.weight"]
    backend.load([("mtp.layers.0.weight", torch.zeros(3)), ("lm_head.weight", torch.zeros_like(embedding))])
    assert contents(backend.live_tensors()) == before


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("qwen3", "model.layers.0.mlp.up_proj.weight", (96, 65)),
        ("qwen3", "model.norm.weight", (64, 1)),
        ("qwen3_moe", "model.layers.0.mlp.experts.1.gate_proj.weight", (95, 64)),
        ("qwen3_moe", "model.layers.0.mlp.experts.9.down_proj.weight", (64, 96)),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(
    checkpoints: dict[str, Path], kind: str, name: str, shape: tuple[int, ...]
) -> None:
    backend = backend_of(load_model(checkpoints[kind]))
    before = contents(backend.live_tensors())
    with pytest.raises(ApplyError, match=r"experts|up_proj|norm") as caught:
        backend.load([(name, torch.zeros(shape))])
    assert "shape" in str(caught.value) or "convert" in str(caught.value)
    assert contents(backend.live_tensors()) == before


def test_weights_do_not_lie_in_the_checkpoint_file(checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"]).requires_grad_(False)
    wanted = contents(dict(model.named_parameters()))
    own_memory(model)
    assert own_memory(model) == 0
    assert contents(dict(model.named_parameters())) == wanted
