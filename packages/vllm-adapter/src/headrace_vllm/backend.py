"""VllmBackend: the InferenceBackend of one vLLM worker."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from torch import nn

from headrace.protocols import Skeleton, WorkerIdentity
from headrace.types import ParamTable, WorkerId
from headrace_vllm.parts import Part, is_of_draft, parts_of
from headrace_vllm.reload import ModuleReload, process_again, without_adapters
from headrace_vllm.watch import processed

if TYPE_CHECKING:
    from headrace.protocols import NamedTensors


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
        self._config = vllm_config
        self._device = device
        self._model = model
        self._parts = parts_of(vllm_config, model)
        self._identity = _identity(vllm_config, device, self._parts)
        self._reload: ModuleReload | None = None
        self.version: int | None = None

    def identity(self) -> WorkerIdentity:
        """Return who this worker is."""
        return self._identity

    def live_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return parameters and persistent buffers by the loader's names; LoRA's own tensors are not among them."""
        return _joined(part.live() for part in self._parts)

    def skeleton(self) -> Skeleton:
        """Return the model as it was constructed; with a draft model, where a source has its weights."""
        model, *drafts = self._parts
        if not drafts:
            return _skeleton(self._parts)

        def for_source(sources: ParamTable) -> Skeleton:
            derived = self.derived()
            return _skeleton([model, *(draft for draft in drafts if draft.wants(sources, derived))])

        return Skeleton(model.structure(), model.load_twin, for_source)

    def loaded_from(self) -> str | None:
        """Return the folder that vLLM read its weights from, or None where it made them up."""
        load_format = str(self._config.load_config.load_format)
        return None if load_format == "dummy" else str(self._config.model_config.model)

    def load(self, pairs: NamedTensors) -> None:
        """Run the models' own loaders; a draft's first, so that what it shares ends as the answering model's."""
        given = dict(pairs)
        model, *drafts = self._parts
        with self._bare():
            for draft in drafts:
                if draft.is_fed_by(given):
                    self._begin(draft)
                    draft.load(given.items())
            model.load(given.items())

    def begin_reload(self) -> None:
        """Give modules whose weights vLLM rewrote the loader's layout again; nothing to do where none are."""
        if self._reload is not None:
            self._reload.abandon()
        self._reload = ModuleReload(self._device)
        self._begin(self._parts[0])

    def end_reload(self) -> None:
        """Have vLLM process them again."""
        if self._reload is not None:
            with self._parts[0].context(), self._bare():
                self._reload.end()
        self._reload = None

    def reload_unit(self, name: str) -> str:
        """Return the module that owns the tensor."""
        return name.rpartition(".")[0] or name

    def optional(self, name: str) -> bool:
        """Return True for buffers (scales of the KV cache, expert maps), which the engine has values of its own for.

        And for a draft model's tensors: not every checkpoint has it.
        """
        return is_of_draft(name) or not self._parts[0].is_parameter(name)

    def derived(self) -> Mapping[str, Sequence[str]]:
        """Return what vLLM computes from weights after loading: packed copies, absorbed projections of attention."""
        names = {id(t): name for part in self._parts for name, t in part.parameters().items()}
        found: dict[str, list[str]] = {}
        for _, path, module in self._deriving():
            own = {} if processed(module) is not None else module._parameters
            held = {id(p) for p in own.values()}
            feeding = [names[id(p)] for p in module.parameters() if id(p) in names and id(p) not in held]
            found |= dict.fromkeys((f"{path} (computed)", *(f"{path}.{name}" for name in own)), feeding)
        return found

    def rederive(self, names: Sequence[str]) -> bool:
        """Compute them again with vLLM's own post-processing."""
        if names:
            for part, _, module in self._deriving():
                with part.context():
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

    def _begin(self, part: Part) -> None:
        """Let a model's rewritten modules take part in the running reload."""
        if self._reload is not None:
            with part.context(), self._bare():
                self._reload.begin(part.rewritten())

    def _deriving(self) -> list[tuple[Part, str, nn.Module]]:
        """Return modules that hold something computed, each once: models share some."""
        seen: set[int] = set()
        found = []
        for part in self._parts:
            for path, module in part.deriving() if part.follows else ():
                if id(module) not in seen:
                    seen.add(id(module))
                    found.append((part, path, module))
        return found

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


def _skeleton(parts: Sequence[Part]) -> Skeleton:
    """Return the models' common structure; the answering one's loader is run first."""
    model, *drafts = parts

    def load(pairs: NamedTensors) -> None:
        given: list[tuple[str, torch.Tensor]] = []
        model.load_twin(_noted(pairs, given))
        for draft in drafts:
            draft.load_twin(given)

    return Skeleton(_joined(part.structure() for part in parts), load if drafts else model.load_twin)


def _noted(pairs: NamedTensors, given: list[tuple[str, torch.Tensor]]) -> NamedTensors:
    for pair in pairs:
        given.append(pair)
        yield pair


def _joined(tables: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor for table in tables for name, tensor in table.items()}


def _identity(config: Any, device: torch.device, parts: Sequence[Part]) -> WorkerIdentity:  # noqa: ANN401
    parallel, hf = config.parallel_config, config.model_config.hf_config
    rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
    worker = WorkerId(f"{socket.gethostname()}-{config.instance_id}", rank)
    digest = hashlib.sha256(
        f"{hf.to_json_string(use_diff=False)}{_quantisation(config)}".encode()
    ).hexdigest()[:16]
    layout = (
        f"vllm {vllm.__version__} headrace-vllm {version('headrace-vllm')} {_models(parts)} {digest} "
        f"{config.model_config.dtype} tp {parallel.tensor_parallel_size} pp {parallel.pipeline_parallel_size} "
        f"ep {parallel.enable_expert_parallel} dp {parallel.data_parallel_size} rank {rank} "
        f"kernels {_kernels(parts)}"
    )
    uuid = (
        f"cpu-{socket.gethostname()}"
        if device.type == "cpu"
        else str(torch.cuda.get_device_properties(device).uuid)
    )
    return WorkerIdentity(worker, parallel.world_size_across_dp, str(device), uuid, layout)


def _quantisation(config: Any) -> str:  # noqa: ANN401
    return f"{config.model_config.quantization} {config.cache_config.cache_dtype} {config.parallel_config.enable_eplb}"


def _models(parts: Sequence[Part]) -> str:
    return " + ".join(
        f"{part.prefix}{type(part.model).__name__}{'' if part.follows else ' (left)'}" for part in parts
    )


def _kernels(parts: Sequence[Part]) -> str:
    """Return a digest of what post-processing did to the modules: other kernels, another recipe."""
    notes = [(f"{p.prefix}{path}", processed(m)) for p in parts for path, m in p.model.named_modules()]
    text = "\n".join(f"{path} {note}" for path, note in notes if note is not None)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _available_bytes() -> int:
    """Return MemAvailable of this host."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
