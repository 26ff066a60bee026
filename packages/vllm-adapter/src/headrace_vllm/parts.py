"""The models of one worker: the one that answers, and the draft models of speculative decoding beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config

from headrace.errors import BackendUnavailableError, HeadraceError
from headrace.protocols import NamedTensors, Skeleton
from headrace.recording import record
from headrace.types import DTYPE_CODES, ParamTable
from headrace_vllm.watch import Watched, drafts_of, processed, watched

logger = logging.getLogger(__name__)
_BASE_LAYER = ".base_layer."


class Part:
    """One model as its receiver sees it: live tensors and structure by names, and the modules that vLLM rewrote.

    Attributes:
        model: The model.
        prefix: What its tensors' names begin with; empty for the model that answers.
        follows: Whether updates are for it too: a draft of another checkpoint has nothing to do with them.
    """

    def __init__(
        self,
        model: nn.Module,
        seen: Watched,
        prefix: str = "",
        *,
        follows: bool = True,
        others: Collection[int] = frozenset(),
    ) -> None:
        self.model: Any = model
        self.prefix = prefix
        self.follows = follows
        self._seen = seen
        self._twin: Any = seen.twin
        named = model.named_parameters(remove_duplicate=False)
        self._shared = frozenset(name for name, tensor in named if id(tensor) in others)
        parameter: Any
        for name, parameter in self._twin.named_parameters(remove_duplicate=False):
            if name in self._shared:
                parameter.weight_loader = _ignore
        self._fed_by: set[str] = set()

    def live(self) -> dict[str, torch.Tensor]:
        """Return its own live tensors, without those that it shares with the model that answers."""
        return self._own(self.model)

    def structure(self) -> dict[str, torch.Tensor]:
        """Return the same as they were constructed."""
        return self._own(self._twin)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return its own live parameters."""
        return self._own(self.model, _parameters)

    def is_parameter(self, name: str) -> bool:
        """Return whether a name is that of a parameter, and not of a buffer."""
        return name.removeprefix(self.prefix) in _parameters(self._twin)

    def load(self, pairs: NamedTensors) -> None:
        """Run the loader on the live model."""
        with self.context(), _incomplete():
            self.model.load_weights(iter(pairs))

    def load_twin(self, pairs: NamedTensors) -> object:
        """Run the loader on the structure."""
        with self.context(), _incomplete():
            return self._twin.load_weights(pairs)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Make the configuration that the model was built with vLLM's current one."""
        with set_current_vllm_config(self._seen.config):
            yield

    def wants(self, sources: ParamTable, derived: Mapping[str, Sequence[str]]) -> bool:
        """Return whether a source fills this draft, all of it; notes which of its parameters do.

        Args:
            sources: The source's parameters.
            derived: What vLLM computes itself, by the names of tensors.
        """
        if not self.follows:
            return False
        try:
            alone = record(
                Skeleton(self.structure(), self.load_twin),
                sources,
                live=None,
                reload_unit=lambda name: name,
                optional=lambda name: not self.is_parameter(name),
                derived=derived,
                can_rederive=True,
            )
        except HeadraceError as error:
            logger.info("the draft model stays as it is: %s", error)
            return False
        if not len(alone.regions):
            return False
        used = {*alone.regions.param.tolist(), *alone.opaque.tolist()}
        self._fed_by |= {sources[i].name for i in used}
        return True

    def is_fed_by(self, names: Collection[str]) -> bool:
        """Return whether some source that was seen to fill this draft is among `names`."""
        return not self._fed_by.isdisjoint(names)

    def rewritten(self) -> list[nn.Module]:
        """Return modules whose parameters are not what the loader wrote, outermost first."""
        twins = dict(self._twin.named_modules())
        return [
            module
            for path, module in self.model.named_modules()
            if getattr(module, "quant_method", None) is not None and _rewritten(module, twins.get(path))
        ]

    def deriving(self) -> list[tuple[str, nn.Module]]:
        """Return modules that hold something computed from parameters that are still the loader's."""
        found = []
        attention = []
        for path, module in self.model.named_modules():
            name = self.prefix + _bare(f"{path}.").rstrip(".")
            note = processed(module)
            if note is not None and note.keeps and not note.rewrote:
                found.append((name, module))
            elif _is_attention(module) and next(module.parameters(), None) is not None:
                attention.append((name, module))
        return found + attention

    def _own(
        self, model: nn.Module, tensors: Callable[[nn.Module], dict[str, torch.Tensor]] | None = None
    ) -> dict[str, torch.Tensor]:
        found = (tensors or _loadable)(model)
        return {self.prefix + name: tensor for name, tensor in found.items() if name not in self._shared}


def parts_of(config: Any, model: nn.Module) -> list[Part]:  # noqa: ANN401 - a VllmConfig
    """Return the models of the worker that `model` answers for; that one is first.

    Raises:
        BackendUnavailableError: The model was built before the plug-in was loaded.
    """
    seen = watched(model)
    if seen is None:
        message = (
            "this model was built without Headrace's plug-in; start vLLM with "
            '--weight-transfer-config \'{"backend":"headrace"}\', or with --worker-extension-cls '
            "headrace_vllm.WorkerExtension, and do not exclude `headrace` from VLLM_PLUGINS"
        )
        raise BackendUnavailableError(message, name="vllm")
    others = {id(parameter) for parameter in model.parameters()}
    parts = [Part(model, seen)]
    for number, draft in enumerate(drafts_of(config, model), start=1):
        prefix = "draft/" if number == 1 else f"draft{number}/"
        known = watched(draft)
        if known is not None:
            parts.append(Part(draft, known, prefix, follows=_one_checkpoint(config), others=others))
    return parts


def is_of_draft(name: str) -> bool:
    """Return whether a tensor is a draft model's; modules' own names have no slash."""
    return "/" in name


def _one_checkpoint(config: Any) -> bool:  # noqa: ANN401 - a VllmConfig
    """Return whether the draft was read from the checkpoint of the model that answers (MTP layers lie there)."""
    draft = getattr(config.speculative_config, "draft_model_config", None)
    own = config.model_config
    return draft is not None and (draft.model, draft.revision) == (own.model, own.revision)


def _ignore(*_args: object, **_kwargs: object) -> bool:
    """Be the loader of a draft's parameter that vLLM has exchanged for the answering model's: its values are that's."""
    return True


@contextmanager
def _incomplete() -> Iterator[None]:
    """Let a draft's loader take the part of its weights that goes through it."""
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check  # noqa: PLC0415
    except ImportError:  # an older vLLM
        yield
        return
    with disable_mtp_completeness_check():
        yield


def _is_attention(module: nn.Module) -> bool:
    """Return whether vLLM has a module process its weights after all others."""
    from vllm.model_executor.layers import attention  # noqa: PLC0415 - heavy, and only here

    asked = getattr(attention, "is_deferred_attention_layer", None)
    if asked is not None:
        return bool(asked(module))
    kinds = (attention.Attention, attention.MLAAttention, attention.MMEncoderAttention)  # vLLM before 0.29
    return isinstance(module, kinds) and hasattr(module, "process_weights_after_loading")


def _rewritten(module: nn.Module, twin: nn.Module | None) -> bool:
    note = processed(module)
    if note is not None and note.rewrote:
        return True
    return twin is not None and _layouts(module) != _layouts(twin)


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
