"""SglangBackend: the InferenceBackend of one SGLang scheduler."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import sglang
import torch
from torch import nn

from headrace.adapter.backend import ModelBackend, device_uuid, models_layout
from headrace.adapter.modules import without_wrappers
from headrace.adapter.part import Part
from headrace.adapter.watch import twin_of
from headrace.errors import ApplyError, BackendUnavailableError
from headrace.protocols import WorkerIdentity
from headrace.types import WorkerId

PAUSE_S = 20.0
_POLL_S = 0.0005


class SglangBackend(ModelBackend):
    """One scheduler's model as the receiver sees it. Made once per scheduler, after its weights are loaded.

    Args:
        scheduler: The scheduler.
        runner: Its ModelRunner.
        instance: SGLang's id of the engine.

    Raises:
        BackendUnavailableError: The model was built before the plug-in was loaded.
    """

    def __init__(self, scheduler: Any, runner: Any, instance: str) -> None:  # noqa: ANN401
        twin = twin_of(runner.model)
        if twin is None:
            message = (
                "this model was built without Headrace's plug-in, or its structure could not be followed, which the "
                "log says then; do not leave `headrace` out of SGLANG_PLUGINS"
            )
            raise BackendUnavailableError(message, name="sglang")
        device = next(runner.model.parameters()).device
        part = Part(runner.model, twin)
        super().__init__([part], device, _identity(scheduler, runner, instance, part))
        self._part = part
        self._scheduler = scheduler
        self._runner = runner

    def loaded_from(self) -> str | None:
        """Return the folder that SGLang read its weights from, or None where it made them up."""
        load_format = self._runner.load_config.load_format
        made_up = getattr(load_format, "value", load_format) == "dummy"
        return None if made_up else str(self._runner.model_config.model_path)

    def bare(self) -> AbstractContextManager[None]:
        """Return a context without LoRA's wrappers, which hold on to parameters that are exchanged."""
        if not self._scheduler.server_args.enable_lora:
            return nullcontext()
        from sglang.srt.lora.layers import BaseLayerWithLoRA  # noqa: PLC0415

        return without_wrappers(self._part.model, BaseLayerWithLoRA)

    def restore(self, module: nn.Module) -> None:
        """Give a rewritten module new parameters as they were constructed, and tell SGLang's method so."""
        super().restore(module)
        layer: Any = module
        if hasattr(layer.quant_method, "restore_weights_before_loading"):
            layer.quant_method.restore_weights_before_loading(module)

    def derived(self) -> Mapping[str, Sequence[str]]:
        """Return what SGLang computes from weights after loading: packed copies, absorbed projections of attention."""
        return {**super().derived(), **self._absorbed()}

    def rederive(self, names: Sequence[str]) -> bool:
        """Compute them again with SGLang's own post-processing."""
        super().rederive(names)
        if names and hasattr(self._part.model, "post_load_weights"):
            self._part.model.post_load_weights()
        return True

    @contextmanager
    def commit_scope(self) -> Iterator[None]:
        """Order writes against forward steps: this scheduler has paused, and its device is idle on both ends.

        Raises:
            ApplyError: The scheduler did not pause; nothing was written.
        """
        self._wait_paused()
        with super().commit_scope():
            yield
        _forget_embeddings()

    def _wait_paused(self) -> None:
        """Make sure of this rank's own pause: one of each group has answered, others may be a moment behind."""
        limit = time.monotonic() + PAUSE_S
        while not self._scheduler._engine_paused:
            if time.monotonic() > limit:
                message = f"SGLang's scheduler did not pause within {PAUSE_S:g} s"
                raise ApplyError(message, name="sglang", phase="commit", retryable=True)
            time.sleep(_POLL_S)

    def _absorbed(self) -> dict[str, list[str]]:
        """Return tensors that the model itself computes after loading, and all that may feed them."""
        if not hasattr(self._part.model, "post_load_weights"):
            return {}
        names = {id(tensor): name for name, tensor in self._part.parameters().items()}
        twins = dict(self._part.twin.named_modules())
        found: dict[str, list[str]] = {}
        for path, module in self._part.modules():
            made = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
            had = vars(twins[path]) if path in twins else {}
            feeding = [names[id(p)] for p in module.parameters() if id(p) in names]
            new = [key for key in made if not isinstance(had.get(key), torch.Tensor)]
            found |= dict.fromkeys((f"{path}.{key}" for key in new if feeding), feeding)
        return found


def _forget_embeddings() -> None:
    """Drop what the old weights made of images: SGLang keeps it under the image's name alone."""
    from sglang.srt.managers import mm_schedule  # noqa: PLC0415

    cache = mm_schedule.embedding_cache
    if cache is not None:
        mm_schedule.init_mm_embedding_cache(cache.max_size)


def _identity(scheduler: Any, runner: Any, instance: str, part: Part) -> WorkerIdentity:  # noqa: ANN401
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415

    parallel, config, arguments = get_parallel(), runner.model_config, scheduler.server_args
    replicas = 1 if parallel.attn_dp_enabled else parallel.num_dp_ranks
    replica = 0 if parallel.attn_dp_enabled else parallel.dp_rank or 0
    rank = replica * parallel.tp_size + parallel.tp_rank
    hf = config.hf_config.to_json_string(use_diff=False)
    layout = (
        f"sglang {sglang.__version__} headrace-sglang {version('headrace-sglang')} "
        f"{models_layout([part], hf, config.quantization, arguments.kv_cache_dtype)} {config.dtype} "
        f"tp {parallel.tp_size} ep {arguments.ep_size} dp {parallel.num_dp_ranks} "
        f"attention dp {parallel.attn_dp_enabled} rank {parallel.tp_rank}"
    )
    device = next(runner.model.parameters()).device
    worker = WorkerId(f"{socket.gethostname()}-{instance}", rank)
    return WorkerIdentity(worker, replicas * parallel.tp_size, str(device), device_uuid(device), layout)
