"""The demo's trainer: real optimizer steps in this process, on the few sentences that the tokenizer knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Mapping

LEARNING_RATE = 1e-3
_IGNORED = -100


class Trainer:
    """A transformers model in float32 under AdamW; every step takes the whole text as one batch.

    Args:
        folder: Checkpoint to go on from.
        sentences: Text as tokens.
        device: Where it trains.
    """

    def __init__(self, folder: Path, sentences: Sequence[list[int]], device: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - the extra `engine`

        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        self._model = model.to(device).train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE)
        self._batch = _batch(sentences).to(device)
        self._labels = self._batch.masked_fill(self._batch == 0, _IGNORED)
        self.losses: list[float] = []

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The live parameters by checkpoint name: what a parameter server publishes."""
        return dict(self._model.named_parameters())

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return copies of all parameters on the CPU, to compare with later."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}

    def step(self) -> float:
        """Take one optimizer step and return the loss before it."""
        self._optimizer.zero_grad()
        loss = self._model(input_ids=self._batch, labels=self._labels, attention_mask=self._batch != 0).loss
        loss.backward()
        self._optimizer.step()
        self.losses.append(float(loss.detach()))
        return self.losses[-1]


def _batch(sentences: Sequence[list[int]]) -> torch.Tensor:
    """Return token rows of equal length; zeros (the begin token, which no sentence holds) behind."""
    width = max(map(len, sentences))
    return torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in sentences])
