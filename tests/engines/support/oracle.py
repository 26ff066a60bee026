"""What a model must answer: transformers on the same weights, in float32."""

from __future__ import annotations

import itertools
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

        torch.set_num_threads(1)  # engines run beside it
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._models = {
                version: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                for version, folder in folders.items()
            }

    def problems(
        self, prompt: Sequence[int], answer: Mapping[str, Any], versions: Sequence[str] | None = None
    ) -> list[str]:
        """Return what is wrong with an answer: tokens or log-probabilities that its weights would not give."""
        return self.problems_of([(prompt, answer, list(versions or answer["versions"]))])

    def problems_of(
        self, answers: Sequence[tuple[Sequence[int], Mapping[str, Any], Sequence[str]]]
    ) -> list[str]:
        """Return what is wrong with answers, all of one length together: prompt, answer, version of every token."""
        found = [
            f"version {v!r} is none that was given"
            for _, _, said in answers
            for v in set(said) - set(self._models)
        ]
        for version in self._models:
            of_it = [item for item in answers if version in item[2]]
            for begin in range(0, len(of_it), 32):
                part = of_it[begin : begin + 32]
                for item, expected in zip(part, self._logprobs(version, part), strict=True):
                    found += _differences(item, version, expected)
        return found

    def problems_with_kept_caches(
        self, prompt: Sequence[int], answer: Mapping[str, Any], versions: Sequence[str]
    ) -> list[str]:
        """Return what is wrong with an answer whose every step used the KV of the steps before, of whatever weights.

        Each token must be what the version that it says it is of makes of them: one step more or less shows.
        """
        expected = self._stepwise(prompt, answer["tokens"], versions)
        said = set(versions)
        return [p for version in said for p in _differences((prompt, answer, versions), version, expected)]

    @torch.inference_mode()
    def _stepwise(self, prompt: Sequence[int], tokens: Sequence[int], versions: Sequence[str]) -> torch.Tensor:
        """Return log-probabilities by position, the answer's steps being computed by one version after another."""
        from transformers import DynamicCache

        from headrace.embedded.stepper import cache_argument

        cache, rows, begin = DynamicCache(), [], 0
        for version, steps in itertools.groupby(versions):
            end = begin + len(list(steps))
            given = [*prompt, *tokens][len(prompt) - 1 + begin if begin else 0 : len(prompt) - 1 + end]
            model = self._models[version]
            made = model(torch.tensor([given]), use_cache=True, **{cache_argument(model): cache})
            rows.append(made.logits[0].float())
            begin = end
        return torch.log_softmax(torch.cat(rows), -1)

    @torch.inference_mode()
    def _logprobs(
        self, version: str, items: Sequence[tuple[Sequence[int], Mapping[str, Any], Sequence[str]]]
    ) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *answer["tokens"]] for prompt, answer, _ in items])
        return torch.log_softmax(self._models[version](ids).logits.float(), -1)


def _differences(
    item: tuple[Sequence[int], Mapping[str, Any], Sequence[str]], version: str, expected: torch.Tensor
) -> list[str]:
    prompt, answer, said = item
    found = []
    for i in (i for i, v in enumerate(said) if v == version):
        token, logprob, row = answer["tokens"][i], answer["logprobs"][i], expected[len(prompt) - 1 + i]
        best, value = int(row.argmax()), float(row[token])
        if best != token and float(row[best]) - value > TOLERANCE:
            found.append(f"token {i} of version {version} is {token}, must be {best}")
        elif abs(value - logprob) > TOLERANCE:
            found.append(f"token {i} of version {version} has log-probability {logprob}, must have {value}")
    return found
