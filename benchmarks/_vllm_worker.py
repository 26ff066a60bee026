"""Runs in every vLLM worker of the benchmark: vLLM's own ways to load, timed there, and the memory-copy ceiling.

Named as vLLM's worker extension; importing it keeps live weights of CPU engines in the loader's layout, as on CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open

if not torch.cuda.is_available():
    import nopack  # noqa: F401 - changes vLLM when it is imported; the benchmark puts it on the path

COPIES = 5


class BenchExtension:
    """Methods for `collective_rpc`."""

    vllm_config: Any
    model_runner: Any

    def bench_memcpy(self) -> float:
        """Return the median seconds of a plain copy of this worker's parameters, all workers copying at once."""
        from vllm.distributed import get_world_group  # noqa: PLC0415 - only an engine's own process has it

        num_bytes = sum(p.numel() * p.element_size() for p in self.model_runner.get_model().parameters())
        source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
        target.copy_(source)
        seconds = []
        for _ in range(COPIES):
            get_world_group().barrier()
            seconds.append(_timed(lambda: target.copy_(source)))
        return median(seconds)

    def bench_load_weights(self, folder: str) -> float:
        """Return the seconds of vLLM's plain `load_weights` from memory."""
        model, tensors = self.model_runner.get_model(), _read(folder)
        with torch.inference_mode():
            return _timed(lambda: model.load_weights(iter(tensors.items())))

    def bench_layerwise(self, folder: str) -> float:
        """Return the seconds of vLLM's layer-wise reload from memory."""
        from vllm.config import set_current_vllm_config  # noqa: PLC0415
        from vllm.model_executor.model_loader.reload import (  # noqa: PLC0415
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        model, tensors = self.model_runner.get_model(), _read(folder)

        def reload() -> None:
            initialize_layerwise_reload(model)
            model.load_weights(iter(tensors.items()))
            finalize_layerwise_reload(model, self.vllm_config.model_config)

        with set_current_vllm_config(self.vllm_config):
            return _timed(reload)


def _timed(call: Callable[[], object]) -> float:
    _synchronize()
    begin = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in memory that is as fast as any for the engine's device."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor.clone()


def _read(folder: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: _own(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
    return found
