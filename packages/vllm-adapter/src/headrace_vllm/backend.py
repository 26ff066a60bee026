"""VllmBackend: the InferenceBackend of one vLLM worker."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
import vllm
from torch import nn

from headrace.adapter.backend import ModelBackend, device_uuid, models_layout
from headrace.adapter.part import Part
from headrace.adapter.watch import processed
from headrace.protocols import WorkerIdentity
from headrace.types import WorkerId
from headrace_vllm.parts import parts_of
from headrace_vllm.reload import process_again, restore, without_adapters


class VllmBackend(ModelBackend):
    """One worker's model as the receiver sees it. Made once per worker, after its weights are loaded.

    Args:
        vllm_config: The engine's configuration, of this worker.
        device: Where the model lies.
        model: The model.

    Raises:
        BackendUnavailableError: The model was built before the plug-in was loaded.
    """

    def __init__(self, vllm_config: Any, device: torch.device, model: nn.Module) -> None:  # noqa: ANN401
        parts = parts_of(vllm_config, model)
        super().__init__(parts, device, _identity(vllm_config, device, parts))
        self._config = vllm_config
        self._model = model

    def loaded_from(self) -> str | None:
        """Return the folder that vLLM read its weights from, or None where it made them up."""
        load_format = str(self._config.load_config.load_format)
        return None if load_format == "dummy" else str(self._config.model_config.model)

    def bare(self) -> AbstractContextManager[None]:
        """Return a context without LoRA's wrappers, which vLLM's loaders do not know."""
        return without_adapters(self._model) if self._config.lora_config else nullcontext()

    def restore(self, module: nn.Module) -> None:
        """Give a rewritten module the loader's layout, by vLLM's own reload."""
        restore(module, self._device)

    def process(self, module: nn.Module) -> None:
        """Run vLLM's post-processing of a module again."""
        if processed(module) is not None:
            process_again(module, self._device)
        else:
            attention: Any = module
            attention.process_weights_after_loading(self._config.model_config.dtype)


def _identity(config: Any, device: torch.device, parts: Sequence[Part]) -> WorkerIdentity:  # noqa: ANN401
    parallel, own = config.parallel_config, config.model_config
    rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
    worker = WorkerId(f"{socket.gethostname()}-{config.instance_id}", rank)
    hf, cache = own.hf_config.to_json_string(use_diff=False), config.cache_config.cache_dtype
    layout = (
        f"vllm {vllm.__version__} headrace-vllm {version('headrace-vllm')} "
        f"{models_layout(parts, hf, own.quantization, cache, parallel.enable_eplb)} {own.dtype} "
        f"tp {parallel.tensor_parallel_size} pp {parallel.pipeline_parallel_size} "
        f"ep {parallel.enable_expert_parallel} dp {parallel.data_parallel_size} rank {rank}"
    )
    return WorkerIdentity(worker, parallel.world_size_across_dp, str(device), device_uuid(device), layout)
