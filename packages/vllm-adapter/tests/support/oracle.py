"""What a model must answer: transformers on the same weights, in float32."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

TOLERANCE = 1e-4


class Oracle:
    """Checks answers of an engine, token by token, against the version that each token says it is of."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._models = {
                version: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                for version, folder in folders.items()
            }

    def problems(self, prompt: Sequence[int], answer: Mapping[str, Any], versions: Sequence[str] | None = None) -> list[str]:
        """Return what is wrong with an answer: tokens or log-probabilities that its weights would not give."""
        tokens, logprobs = answer["tokens"], answer["logprobs"]
        said = list(versions or answer["versions"])
        found = []
        for version in dict.fromkeys(said):
            if version not in self._models:
                return [f"version {version!r} is none that was given"]
            expected = self._logprobs(version, [*prompt, *tokens])
            for i in (i for i, v in enumerate(said) if v == version):
                row = expected[len(prompt) - 1 + i]
                best, value = int(row.argmax()), float(row[tokens[i]])
                if best != tokens[i] and float(row[best]) - value > TOLERANCE:
                    found.append(f"token {i} of version {version} is {tokens[i]}, must be {best}")
                elif abs(value - logprobs[i]) > TOLERANCE:
                    found.append(f"token {i} of version {version} has log-probability {logprobs[i]}, must have {value}")
        return found

    @torch.inference_mode()
    def _logprobs(self, version: str, tokens: Sequence[int]) -> torch.Tensor:
        logits = self._models[version](torch.tensor([list(tokens)])).logits[0]
        return torch.log_softmax(logits.float(), -1)
