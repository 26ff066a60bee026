"""ModelBackend: the InferenceBackend of a worker whose models are `torch.nn.Module`s with vLLM's kind of layers.

That is: `model.load_weights(pairs)`, and modules with a `quant_method` that processes them after loading. The adapter
of an engine names what is the engine's own, in the methods that are marked so.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headrace.adapter.part import Part, is_of_draft
from headrace.adapter.reload import ModuleReload
from headrace.adapter.watch import processed
from headrace.protocols import Skeleton, WorkerIdentity
from headrace.segments.cuda import uuid_of

if TYPE_CHECKING:
    from headrace.protocols import NamedTensors
    from headrace.types import ParamTable


class ModelBackend:
    """One worker's models as the receiver sees them. Made once per worker, after its weights are loaded.

    Args:
        parts: The model that answers, then draft models.
        device: Where they lie.
        identity: Who the worker is.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device, identity: WorkerIdentity) -> None:
        self._parts = parts
        self._device = device
        self._identity = identity
        self._reload: ModuleReload | None = None
        self.version: int | None = None

    def bare(self) -> AbstractContextManager[None]:
        """Return a context in which models are without wrappers that their loaders do not know. The engine's own."""
        return nullcontext()

    def restore(self, module: nn.Module) -> None:
        """Give a rewritten module new parameters as they were constructed; the old ones stay as they are."""
        twin = next(twin for part in self._parts if (twin := part.twin_of(module)) is not None)
        for name, made in twin._parameters.items():
            module._parameters[name] = None if made is None else _materialized(made, self._device)

    def process(self, module: nn.Module) -> None:
        """Run the engine's post-processing of a module again. The engine's own."""
        layer: Any = module
        layer.quant_method.process_weights_after_loading(module)

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

    def load(self, pairs: NamedTensors) -> None:
        """Run the models' own loaders; a draft's first, so that what it shares ends as the answering model's."""
        given = dict(pairs)
        model, *drafts = self._parts
        with self._abandoning(), self.bare():
            for draft in drafts:
                if draft.is_fed_by(given):
                    self._begin(draft)
                    draft.load(given.items())
            model.load(given.items())

    def begin_reload(self) -> None:
        """Give modules whose weights were rewritten the loader's layout again; nothing to do where none are."""
        self._abandon()
        self._reload = ModuleReload(self.restore, self.process)
        with self._abandoning():
            self._begin(self._parts[0])

    def end_reload(self) -> None:
        """Have the engine process them again."""
        if self._reload is not None:
            with self._abandoning(), self._parts[0].context(), self.bare():
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
        """Return what the engine computes from weights after loading: packed copies, absorbed projections."""
        names = {id(t): name for part in self._parts for name, t in part.parameters().items()}
        found: dict[str, list[str]] = {}
        for _, path, module in self._deriving():
            own = {} if processed(module) is not None else module._parameters
            held = {id(p) for p in own.values()}
            feeding = [names[id(p)] for p in module.parameters() if id(p) in names and id(p) not in held]
            found |= dict.fromkeys((f"{path} (computed)", *(f"{path}.{name}" for name in own)), feeding)
        return found

    def rederive(self, names: Sequence[str]) -> bool:
        """Compute them again with the engine's own post-processing."""
        if names:
            for part, _, module in self._deriving():
                with part.context():
                    self.process(module)
        return True

    def free_memory_bytes(self) -> int:
        """Return this worker's share of half the free memory."""
        if self._device.type == "cpu":
            return _available_bytes() // (2 * self._identity.world_size)
        return int(torch.cuda.mem_get_info(self._device)[0]) // 2

    @contextmanager
    def commit_scope(self) -> Iterator[None]:
        """Order writes against forward steps: they are paused or held off, and the device is idle on both ends."""
        frozen = any(tensor.is_inference() for tensor in self._parts[0].model.parameters())
        with torch.inference_mode(frozen), torch.no_grad():
            self._synchronize()
            yield
            self._synchronize()

    def set_version(self, version: int) -> None:
        """Note the version; the engine's own is its front's, which `EngineControl.confirm` tells."""
        self.version = version

    def _begin(self, part: Part) -> None:
        """Let a model's rewritten modules take part in the running reload."""
        if self._reload is not None:
            with part.context(), self.bare():
                self._reload.begin(part.rewritten())

    @contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Take a reload back that fails in the body: no second copy is kept until the next one begins."""
        try:
            yield
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        if self._reload is not None:
            self._reload.abandon()
        self._reload = None

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

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def models_layout(parts: Sequence[Part], *configurations: object) -> str:
    """Return what of the models decides what their loaders do, for `WorkerIdentity.layout`.

    Classes, a digest of the configurations, and one of what post-processing did: other kernels, another recipe.
    """
    classes = " + ".join(
        f"{part.prefix}{type(part.model).__name__}{'' if part.follows else ' (left)'}" for part in parts
    )
    notes = [(f"{p.prefix}{path}", processed(m)) for p in parts for path, m in p.model.named_modules()]
    kernels = "\n".join(f"{path} {note}" for path, note in notes if note is not None)
    return f"{classes} {_digest(' '.join(map(str, configurations)))} kernels {_digest(kernels)}"


def device_uuid(device: torch.device) -> str:
    """Return which physical device this is; a host's CPUs are one."""
    if device.type == "cpu":
        return f"cpu-{socket.gethostname()}"
    return uuid_of(device)


def _materialized(twin: torch.Tensor, device: torch.device) -> Any:  # noqa: ANN401 - a parameter of the twin's class
    """Return an empty parameter on the device with the twin's class, layout and loader."""
    empty = torch.empty_strided(twin.shape, twin.stride(), dtype=twin.dtype, device=device)
    made = torch.Tensor._make_subclass(type(twin), empty, twin.requires_grad)
    made.__dict__.update(twin.__dict__)
    return made


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _available_bytes() -> int:
    """Return MemAvailable of this host."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
