"""Runs in every vLLM worker of the benchmark: vLLM's own ways to load, timed there, and the memory-copy ceiling.

Named as vLLM's worker extension; importing it keeps live weights of CPU engines in the loader's layout, as on CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open

from benchmarks import _gpu
from benchmarks._models import SERVED, Model

if not torch.cuda.is_available():
    import nopack  # noqa: F401 - changes vLLM when it is imported; the benchmark puts it on the path

COPIES = 5


try:
    from checkpoint_engine.worker import VllmColocateWorkerExtension as _Peer
except ImportError:

    class _Peer:  # type: ignore[no-redef]
        """checkpoint-engine is not installed."""


class BenchExtension(_Peer):
    """Methods for `collective_rpc`; checkpoint-engine's own too, where it is installed."""

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

    def bench_host_to_device(self) -> float:
        """Return bytes per second from pinned memory into this worker's GPU, all workers at once."""
        return self._together(lambda: _gpu.host_to_device(None, None))  # type: ignore[arg-type]

    def bench_device_to_device(self) -> float:
        """Return payload bytes per second of a copy inside this worker's GPU."""
        return self._together(lambda: _gpu.device_to_device(None, None))  # type: ignore[arg-type]

    def bench_pool_load_weights(self, name: str) -> float:
        """Return the seconds of vLLM's plain `load_weights` of the pool's tensors, from pinned memory."""
        model = self.model_runner.get_model()
        with torch.inference_mode():
            return self._together(lambda: _timed(lambda: model.load_weights(_pool_tensors(SERVED[name]))))

    def bench_pool_layerwise(self, name: str) -> float:
        """Return the seconds of vLLM's layer-wise reload of the pool's tensors, from pinned memory."""
        return self._together(lambda: self._layerwise(lambda: _pool_tensors(SERVED[name])))

    def _together(self, call: Callable[[], float]) -> float:
        from vllm.distributed import get_world_group  # noqa: PLC0415

        get_world_group().barrier()
        found = call()
        torch.cuda.empty_cache()
        return found

    def bench_load_weights(self, folder: str) -> float:
        """Return the seconds of vLLM's plain `load_weights` from memory."""
        model, tensors = self.model_runner.get_model(), _read(folder)
        with torch.inference_mode():
            return _timed(lambda: model.load_weights(iter(tensors.items())))

    def bench_layerwise(self, folder: str) -> float:
        """Return the seconds of vLLM's layer-wise reload from memory."""
        tensors = _read(folder)
        return self._layerwise(lambda: iter(tensors.items()))

    def _layerwise(self, pairs: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> float:
        from vllm.config import set_current_vllm_config  # noqa: PLC0415
        from vllm.model_executor.model_loader.reload import (  # noqa: PLC0415
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        model = self.model_runner.get_model()

        def reload() -> None:
            initialize_layerwise_reload(model)
            model.load_weights(pairs())
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


@lru_cache(1)
def _pool() -> torch.Tensor:
    return _gpu.make_pool(finite=True).pin_memory()


def _pool_tensors(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's tensors, places in the pinned pool."""
    for meta in model.params():
        begin = _gpu.place_of(meta.name, 3, meta.num_bytes)
        flat = _pool()[begin : begin + meta.num_bytes]
        yield meta.name, flat.view(getattr(torch, meta.dtype)).view(meta.shape)


def _read(folder: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: _own(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
    return found
