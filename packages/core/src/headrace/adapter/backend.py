"""ModelBackend: the InferenceBackend of a worker whose model is a `torch.nn.Module` with vLLM's kind of layers.

That is: `model.load_weights(pairs)`, and modules with a `quant_method` that processes them after loading. The adapter
of an engine names what is the engine's own, in the methods that are marked so.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headrace.adapter.modules import bare_modules, loadable, parameters
from headrace.adapter.reload import ModuleReload
from headrace.adapter.watch import processed, was_rewritten
from headrace.protocols import Skeleton, WorkerIdentity

if TYPE_CHECKING:
    from headrace.protocols import NamedTensors


class ModelBackend:
    """One worker's model as the receiver sees it. Made once per worker, after its weights are loaded.

    Args:
        model: The model.
        twin: The same as it was constructed, on the meta device.
        device: Where the model lies.
        identity: Who the worker is.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, device: torch.device, identity: WorkerIdentity) -> None:
        self._model = model
        self._twin = twin
        self._device = device
        self._identity = identity
        self._reload: ModuleReload | None = None
        self.version: int | None = None

    def loading(self) -> AbstractContextManager[object]:
        """Return what the engine's loader and post-processing must run in. The engine's own."""
        return nullcontext()

    def bare(self) -> AbstractContextManager[None]:
        """Return a context in which the model is without wrappers that its loader does not know. The engine's own."""
        return nullcontext()

    def restore(self, module: nn.Module) -> None:
        """Give a rewritten module parameters in the loader's layout. The engine's own."""
        raise TypeError(f"{type(self).__name__} cannot reload {type(module).__name__}")

    def process(self, module: nn.Module) -> None:
        """Run the engine's post-processing of a module again. The engine's own."""
        layer: Any = module
        layer.quant_method.process_weights_after_loading(module)

    def deriving(self) -> list[tuple[str, nn.Module]]:
        """Return modules that hold something computed from parameters that are still the loader's."""
        noted = [(path, module, processed(module)) for path, module in bare_modules(self._model)]
        return [(path, module) for path, module, note in noted if note and note.keeps and not note.rewrote]

    def identity(self) -> WorkerIdentity:
        """Return who this worker is."""
        return self._identity

    def live_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return parameters and persistent buffers by the loader's names; LoRA's own tensors are not among them."""
        return loadable(self._model)

    def skeleton(self) -> Skeleton:
        """Return the model as it was constructed."""
        return Skeleton(loadable(self._twin), self._record)

    def load(self, pairs: NamedTensors) -> None:
        """Run the model's own loader."""
        model: Any = self._model
        with self.loading(), self.bare():
            model.load_weights(iter(list(pairs)))

    def begin_reload(self) -> None:
        """Give modules whose weights were rewritten the loader's layout again; nothing to do where none are."""
        with self.loading(), self.bare():
            if self._reload is not None:
                self._reload.abandon()
            self._reload = ModuleReload(self._rewritten(), self.restore, self.process)
            self._reload.begin()

    def end_reload(self) -> None:
        """Have the engine process them again."""
        if self._reload is not None:
            with self.loading(), self.bare():
                self._reload.end()
        self._reload = None

    def reload_unit(self, name: str) -> str:
        """Return the module that owns the tensor."""
        return name.rpartition(".")[0] or name

    def optional(self, name: str) -> bool:
        """Return True for buffers (scales of the KV cache, expert maps): the engine has values of its own for them."""
        return name not in parameters(self._twin)

    def derived(self) -> Mapping[str, Sequence[str]]:
        """Return what the engine computes from weights after loading: packed copies, absorbed projections."""
        names = {id(tensor): name for name, tensor in parameters(self._model).items()}
        found: dict[str, list[str]] = {}
        for path, module in self.deriving():
            own = {} if processed(module) is not None else module._parameters
            held = {id(p) for p in own.values()}
            feeding = [names[id(p)] for p in module.parameters() if id(p) in names and id(p) not in held]
            found |= dict.fromkeys((f"{path} (computed)", *(f"{path}.{name}" for name in own)), feeding)
        return found

    def rederive(self, names: Sequence[str]) -> bool:
        """Compute them again with the engine's own post-processing."""
        if names:
            with self.loading():
                for _, module in self.deriving():
                    self.process(module)
        return True

    def free_memory_bytes(self) -> int:
        """Return this worker's share of half the free memory."""
        if self._device.type == "cpu":
            return _available_bytes() // (2 * self._identity.world_size)
        return int(torch.cuda.mem_get_info(self._device)[0]) // 2

    @contextmanager
    def commit_scope(self) -> Iterator[None]:
        """Order writes against forward steps: the engine is paused and its device idle on both ends."""
        frozen = any(tensor.is_inference() for tensor in self._model.parameters())
        with torch.inference_mode(frozen), torch.no_grad():
            self._synchronize()
            yield
            self._synchronize()

    def set_version(self, version: int) -> None:
        """Note the version; the engine's own is its front's, which `EngineControl.confirm` tells."""
        self.version = version

    def _record(self, pairs: NamedTensors) -> object:
        twin: Any = self._twin
        with self.loading():
            return twin.load_weights(pairs)

    def _rewritten(self) -> list[nn.Module]:
        """Return modules whose parameters are not what the loader wrote, outermost first."""
        twins = dict(self._twin.named_modules())
        return [
            module
            for path, module in self._model.named_modules()
            if getattr(module, "quant_method", None) is not None and was_rewritten(module, twins.get(path))
        ]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def device_uuid(device: torch.device) -> str:
    """Return which physical device this is; a host's CPUs are one."""
    if device.type == "cpu":
        return f"cpu-{socket.gethostname()}"
    return str(torch.cuda.get_device_properties(device).uuid)


def _available_bytes() -> int:
    """Return MemAvailable of this host."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
