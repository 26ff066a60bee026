"""VllmBackend: the InferenceBackend of one vLLM worker."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from torch import nn
from vllm.config import set_current_vllm_config

from headrace.errors import BackendUnavailableError
from headrace.protocols import Skeleton, WorkerIdentity
from headrace.types import DTYPE_CODES, WorkerId
from headrace_vllm.reload import ModuleReload, process_again, without_adapters
from headrace_vllm.watch import Watched, processed, watched

if TYPE_CHECKING:
    from headrace.protocols import NamedTensors

_BASE_LAYER = ".base_layer."


class VllmBackend:
    """One worker's model as the receiver sees it. Made once per worker, after its weights are loaded.

    Args:
        vllm_config: The engine's configuration, of this worker.
        device: Where the model lies.
        model: The model.

    Raises:
        BackendUnavailableError: The model was built before the plug-in was loaded.
    """

    def __init__(self, vllm_config: Any, device: torch.device, model: nn.Module) -> None:  # noqa: ANN401
        seen = watched(model)
        if seen is None:
            message = (
                "this model was built without Headrace's plug-in; start vLLM with "
                '--weight-transfer-config \'{"backend":"headrace"}\', or with --worker-extension-cls '
                "headrace_vllm.WorkerExtension, and do not exclude `headrace` from VLLM_PLUGINS"
            )
            raise BackendUnavailableError(message, name="vllm")
        self._config = vllm_config
        self._device = device
        self._model = model
        self._seen: Watched = seen
        self._identity = _identity(vllm_config, device, model)
        self._reload: ModuleReload | None = None
        self.version: int | None = None

    def identity(self) -> WorkerIdentity:
        """Return who this worker is."""
        return self._identity

    def live_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return parameters and persistent buffers by the loader's names; LoRA's own tensors are not among them."""
        return _loadable(self._model)

    def skeleton(self) -> Skeleton:
        """Return the model as it was constructed."""
        twin: Any = self._seen.twin
        return Skeleton(_loadable(twin), self._recorded(twin))

    def loaded_from(self) -> str | None:
        """Return the folder that vLLM read its weights from, or None where it made them up."""
        load_format = str(self._config.load_config.load_format)
        return None if load_format == "dummy" else str(self._config.model_config.model)

    def load(self, pairs: NamedTensors) -> None:
        """Run the model's own loader."""
        model: Any = self._model
        with set_current_vllm_config(self._config), self._bare():
            model.load_weights(iter(list(pairs)))

    def begin_reload(self) -> None:
        """Give modules whose weights vLLM rewrote the loader's layout again; nothing to do where none are."""
        with set_current_vllm_config(self._config), self._bare():
            if self._reload is not None:
                self._reload.abandon()
            self._reload = ModuleReload(self._rewritten(), self._device)
            self._reload.begin()

    def end_reload(self) -> None:
        """Have vLLM process them again."""
        if self._reload is not None:
            with set_current_vllm_config(self._config), self._bare():
                self._reload.end()
        self._reload = None

    def reload_unit(self, name: str) -> str:
        """Return the module that owns the tensor."""
        return name.rpartition(".")[0] or name

    def optional(self, name: str) -> bool:
        """Return True for buffers (scales of the KV cache, expert maps): the engine has values of its own for them."""
        return name not in _parameters(self._seen.twin)

    def derived(self) -> Mapping[str, Sequence[str]]:
        """Return what vLLM computes from weights after loading: packed copies, absorbed projections of attention."""
        names = {id(tensor): name for name, tensor in _parameters(self._model).items()}
        found: dict[str, list[str]] = {}
        for path, module in self._deriving():
            own = {} if processed(module) is not None else module._parameters
            held = {id(p) for p in own.values()}
            feeding = [names[id(p)] for p in module.parameters() if id(p) in names and id(p) not in held]
            found |= dict.fromkeys((f"{path} (computed)", *(f"{path}.{name}" for name in own)), feeding)
        return found

    def rederive(self, names: Sequence[str]) -> bool:
        """Compute them again with vLLM's own post-processing."""
        if names:
            with set_current_vllm_config(self._config):
                for _, module in self._deriving():
                    self._rederive(module)
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
        """Note the version; vLLM's own is the engine core's, which `EngineControl.confirm` tells."""
        self.version = version

    def _recorded(self, twin: Any) -> Any:  # noqa: ANN401
        def load(pairs: NamedTensors) -> object:
            with set_current_vllm_config(self._config):
                return twin.load_weights(pairs)

        return load

    def _rewritten(self) -> list[nn.Module]:
        """Return modules whose parameters are not what the loader wrote, outermost first."""
        twins = dict(self._seen.twin.named_modules())
        return [
            module
            for path, module in self._model.named_modules()
            if getattr(module, "quant_method", None) is not None and _rewritten(module, twins.get(path))
        ]

    def _deriving(self) -> list[tuple[str, nn.Module]]:
        """Return modules that hold something computed from parameters that are still the loader's."""
        from vllm.model_executor.model_loader.utils import is_deferred_attention_layer  # noqa: PLC0415

        found = []
        attention = []
        for path, module in _bare_modules(self._model):
            note = processed(module)
            if note is not None and note.keeps and not note.rewrote:
                found.append((path, module))
            elif is_deferred_attention_layer(module) and next(module.parameters(), None) is not None:
                attention.append((path, module))
        return found + attention

    def _rederive(self, module: nn.Module) -> None:
        if processed(module) is not None:
            process_again(module, self._device)
        else:
            attention: Any = module
            attention.process_weights_after_loading(self._config.model_config.dtype)

    def _bare(self) -> AbstractContextManager[None]:
        return without_adapters(self._model) if self._config.lora_config else nullcontext()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _bare_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{path}.".replace(_BASE_LAYER, ".").rstrip("."), module) for path, module in model.named_modules()
    ]


def _rewritten(module: nn.Module, twin: nn.Module | None) -> bool:
    note = processed(module)
    if note is not None and note.rewrote:
        return True
    if twin is None:
        return False
    return _layouts(module) != _layouts(twin)


def _layouts(module: nn.Module) -> dict[str, object]:
    return {name: (p.shape, p.dtype, p.stride()) for name, p in module._parameters.items() if p is not None}


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {_bare(name): tensor for name, tensor in model.named_parameters()}


def _loadable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers that Headrace can move, tied ones under their first name."""
    kept = {
        f"{path}." if path else "": module._non_persistent_buffers_set
        for path, module in model.named_modules()
    }
    buffers = {
        _bare(name): tensor
        for name, tensor in model.named_buffers()
        if name.rpartition(".")[2] not in kept.get(name[: len(name) - len(name.rpartition(".")[2])], set())
    }
    tensors = _parameters(model) | buffers
    return {name: t for name, t in tensors.items() if str(t.dtype).removeprefix("torch.") in DTYPE_CODES}


def _bare(name: str) -> str:
    return name.replace(_BASE_LAYER, ".")


def _identity(config: Any, device: torch.device, model: nn.Module) -> WorkerIdentity:  # noqa: ANN401
    parallel, hf = config.parallel_config, config.model_config.hf_config
    rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
    worker = WorkerId(f"{socket.gethostname()}-{config.instance_id}", rank)
    digest = hashlib.sha256(
        f"{hf.to_json_string(use_diff=False)}{_quantisation(config)}".encode()
    ).hexdigest()[:16]
    layout = (
        f"vllm {vllm.__version__} headrace-vllm {version('headrace-vllm')} {type(model).__name__} {digest} "
        f"{config.model_config.dtype} tp {parallel.tensor_parallel_size} pp {parallel.pipeline_parallel_size} "
        f"ep {parallel.enable_expert_parallel} dp {parallel.data_parallel_size} rank {rank} "
        f"kernels {_kernels(model)}"
    )
    uuid = (
        f"cpu-{socket.gethostname()}"
        if device.type == "cpu"
        else str(torch.cuda.get_device_properties(device).uuid)
    )
    return WorkerIdentity(worker, parallel.world_size_across_dp, str(device), uuid, layout)


def _quantisation(config: Any) -> str:  # noqa: ANN401
    return f"{config.model_config.quantization} {config.cache_config.cache_dtype} {config.parallel_config.enable_eplb}"


def _kernels(model: nn.Module) -> str:
    """Return a digest of what post-processing did to the modules: other kernels, another recipe."""
    notes = [(path, processed(module)) for path, module in model.named_modules()]
    text = "\n".join(f"{path} {note}" for path, note in notes if note is not None)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _available_bytes() -> int:
    """Return MemAvailable of this host."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
