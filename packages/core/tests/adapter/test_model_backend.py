"""The shared backend of adapters keeps the contract, on a model whose layers do to their weights what kernels do."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from headrace.adapter.backend import ModelBackend, models_layout
from headrace.adapter.part import Part
from headrace.adapter.watch import processed, twin_of, watch
from headrace.errors import ApplyError
from headrace.protocols import InferenceBackend, WorkerIdentity
from headrace.testing.backend_suite import BackendTests, Weights, reload
from headrace.types import WorkerId

WIDTH, OUT = 8, 6


class Plain:
    """Keeps weights as they were loaded."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Do nothing."""

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.weight.T


class Repacks(Plain):
    """Holds packed weights alone, without their loader."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight = nn.Parameter(layer.weight.data.T.contiguous(), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.weight


class Keeps(Plain):
    """Holds a packed copy beside the weights."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = layer.weight.data.T.contiguous()

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.packed


class Layer(nn.Module):
    """A linear layer, one or several parameters of the file on top of each other."""

    def __init__(self, method: Plain, rows: int) -> None:
        super().__init__()
        self.quant_method = method
        self.weight = nn.Parameter(torch.empty(rows, WIDTH), requires_grad=False)
        self.weight.weight_loader = self.load_part  # type: ignore[attr-defined]

    def load_part(self, parameter: torch.Tensor, loaded: torch.Tensor, part: int = 0) -> None:
        parameter.data[part * WIDTH : (part + 1) * WIDTH].copy_(loaded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x)


class Model(nn.Module):
    """A fused pair and two more layers, with a loader as engines have them."""

    def __init__(self, method: type[Plain]) -> None:
        super().__init__()
        self.gate_up = Layer(method(), 2 * WIDTH)
        self.down = Layer(method(), OUT)
        self.norm = nn.Parameter(torch.empty(WIDTH), requires_grad=False)

    def load_weights(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        named: dict[str, Any] = dict(self.named_parameters())
        for name, tensor in pairs:
            if name == "norm":
                self.norm.data.copy_(tensor)
            elif name.startswith(("gate", "up")):
                named["gate_up.weight"].weight_loader(named["gate_up.weight"], tensor, int(name.startswith("up")))
            else:
                named[name].weight_loader(named[name], tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x * self.norm).chunk(2, -1)
        made: torch.Tensor = self.down(torch.tanh(gate) * up)
        return made


class FileBackend(ModelBackend):
    """Knows its file."""

    def __init__(self, model: Model, folder: Path) -> None:
        twin = twin_of(model)
        assert twin is not None
        part = Part(model, twin)
        layout = f"test {models_layout([part], 'test')}"
        identity = WorkerIdentity(WorkerId(f"model-{id(model)}", 0), 1, "cpu", "cpu", layout)
        super().__init__([part], torch.device("cpu"), identity)
        self.folder = folder

    def loaded_from(self) -> str:
        return str(self.folder)


class ModelBackendTests(BackendTests):
    method: type[Plain]

    @classmethod
    def make_checkpoint(cls, folder: Path, seed: int) -> Path:
        make = torch.Generator().manual_seed(seed)
        rows = {"gate.weight": WIDTH, "up.weight": WIDTH, "down.weight": OUT}
        tensors = {name: torch.randn(count, WIDTH, generator=make) for name, count in rows.items()}
        save_file(tensors | {"norm": torch.rand(WIDTH, generator=make)}, folder / "model.safetensors")
        return folder

    @classmethod
    def make_backend(cls, checkpoint: Path) -> InferenceBackend:
        cls.model = Model(cls.method)
        watch(cls.model)
        cls.model.load_weights(load_file(checkpoint / "model.safetensors").items())
        for layer in (cls.model.gate_up, cls.model.down):
            layer.quant_method.process_weights_after_loading(layer)
        return FileBackend(cls.model, checkpoint)

    @classmethod
    def compute(cls, backend: InferenceBackend) -> torch.Tensor:
        return cls.model(torch.linspace(-1, 1, WIDTH))

    def test_what_was_seen(self, backend: InferenceBackend) -> None:
        notes = [processed(layer) for layer in (self.model.gate_up, self.model.down)]
        expected = (self.method is Repacks, self.method is Keeps)
        assert [(note.rewrote, note.keeps) for note in notes if note] == [expected] * 2


def _out_of_memory(_layer: nn.Module) -> None:
    raise torch.OutOfMemoryError


class TestPlain(ModelBackendTests):
    method = Plain


class TestRepacked(ModelBackendTests):
    method = Repacks

    def test_a_reload_that_breaks_off_leaves_the_old_weights(self, backend: ModelBackend) -> None:
        before = self.compute(backend)
        backend.begin_reload()
        backend.load([("gate.weight", torch.zeros(WIDTH, WIDTH))])
        with pytest.raises(RuntimeError):
            backend.load([("down.weight", torch.zeros(OUT, WIDTH + 1))])
        assert torch.equal(self.compute(backend), before)

    def test_a_reload_that_never_ends_is_taken_back_by_the_next(self, backend: ModelBackend) -> None:
        old = dict(self.model.named_parameters())
        backend.begin_reload()
        backend.begin_reload()
        with pytest.raises(RuntimeError):
            backend.load([("down.weight", torch.zeros(OUT, WIDTH + 1))])
        assert all(old[name] is parameter for name, parameter in self.model.named_parameters())

    @pytest.mark.parametrize("failing", ["gate_up", "down"])
    def test_a_restore_without_memory_loses_no_weights(
        self, backend: ModelBackend, other: Weights, failing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As vLLM's: first the parameters are taken away, then memory for new ones is asked for."""
        before, old = self.compute(backend), dict(self.model.named_parameters())

        def restore(module: nn.Module) -> None:
            if module is not getattr(self.model, failing):
                ModelBackend.restore(backend, module)
                return
            del module.weight
            module.register_parameter("weight", nn.Parameter(torch.empty(WIDTH, WIDTH, device="meta")))
            module.register_buffer("scale", torch.empty(1, device="meta"))
            raise torch.OutOfMemoryError

        with monkeypatch.context() as patch:
            patch.setattr(backend, "restore", restore)
            with pytest.raises(torch.OutOfMemoryError):
                backend.begin_reload()
        assert torch.equal(self.compute(backend), before)
        assert not list(self.model.buffers())
        reload(backend, other.tensors)
        assert all(old[name] is parameter for name, parameter in self.model.named_parameters())
        assert torch.equal(self.compute(backend), other.output)

    def test_processing_that_fails_keeps_no_second_copy(
        self, backend: ModelBackend, other: Weights, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = dict(self.model.named_parameters())
        backend.begin_reload()
        backend.load(other.tensors.items())
        copy = weakref.ref(self.model.down.weight)
        monkeypatch.setattr(self.model.down.quant_method, "process_weights_after_loading", _out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            backend.end_reload()
        assert all(old[name] is parameter for name, parameter in self.model.named_parameters())
        gc.collect()
        assert copy() is None

    def test_a_loader_that_drops_weights_is_noticed(self, backend: ModelBackend) -> None:
        before = self.compute(backend)
        backend.begin_reload()
        backend.load((name, torch.zeros(WIDTH, WIDTH)) for name in ("gate.weight", "up.weight"))
        with pytest.raises(ApplyError, match="wrote nothing into weight of a Layer"):
            backend.end_reload()
        assert torch.equal(self.compute(backend), before)


class TestPackedCopies(ModelBackendTests):
    method = Keeps
