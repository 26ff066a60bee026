"""Forward steps in one worker: a KV cache per request, one token per step."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from headrace.embedded.messages import Job, Step, Stepped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headrace.embedded.backend import TorchBackend


class Stepper:
    """Runs the model for every job of a step; only rank 0 samples, so that all ranks continue alike."""

    def __init__(
        self, model: PreTrainedModel, backend: TorchBackend, device: torch.device, *, samples: bool
    ) -> None:
        self._model = model
        self._backend = backend
        self._device = device
        self._samples = samples
        self._cache_argument = cache_argument(model)
        self._caches: dict[int, DynamicCache] = {}

    @property
    def num_caches(self) -> int:
        """Number of requests with a KV cache."""
        return len(self._caches)

    def drop_caches(self) -> None:
        """Forget every KV cache."""
        self._caches.clear()

    @torch.inference_mode()
    def step(self, command: Step) -> Stepped:
        """Make one token per job. Collective over the ranks of the instance."""
        for request in command.ended:
            self._caches.pop(request, None)
        begin = self._backend.seen
        tokens = [token for job in command.jobs if (token := self._run(job)) is not None]
        return Stepped(tokens, begin, self._backend.seen)

    def _run(self, job: Job) -> int | None:
        if job.fresh:
            self._caches[job.request] = DynamicCache(config=self._model.config)
        output = self._model(
            input_ids=torch.tensor([job.tokens], device=self._device),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self._caches[job.request]},
        )
        return sample(output.logits[0, -1], job) if self._samples else None


def cache_argument(model: PreTrainedModel) -> str:
    """Return by which name a model takes its KV cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def sample(logits: torch.Tensor, job: Job) -> int:
    """Pick the next token: greedy at temperature 0, else drawn by a generator of seed and position."""
    if job.temperature == 0:
        return int(logits.argmax())
    generator = torch.Generator().manual_seed((job.seed * 1_000_003 + job.position) % (1 << 63))
    weights = torch.softmax(logits.float().cpu() / job.temperature, dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))
