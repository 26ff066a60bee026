"""What one step may see, spans of versions, text from tokens, and sampling: no processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.embedded.backend import TorchBackend
from headrace.embedded.generation import (
    Finished,
    Request,
    Sampling,
    TokenMade,
    version_conflict,
    version_spans,
)
from headrace.embedded.messages import Job, Seen, Step, Stepped
from headrace.embedded.stepper import Stepper, sample
from headrace.embedded.text import TextStream
from headrace.types import WorkerId


def stepped(begin: tuple[int | None, int], end: tuple[int | None, int]) -> Stepped:
    return Stepped([], Seen(*begin), Seen(*end))


@pytest.mark.parametrize(
    ("replies", "conflict"),
    [
        ([stepped((1, 0), (1, 0))], False),
        ([stepped((1, 2), (1, 2)), stepped((1, 2), (1, 2))], False),
        ([stepped((1, 2), (1, 2)), stepped((2, 2), (2, 2))], True),
        ([stepped((1, 0), (2, 0))], True),
        ([stepped((1, 1), (1, 1))], True),
        ([stepped((1, 0), (1, 2))], True),
        ([stepped((1, 0), (1, 0)), stepped((1, 0), (1, 1))], True),
    ],
)
def test_a_step_that_saw_two_versions_is_noticed(replies: list[Stepped], conflict: bool) -> None:
    assert bool(version_conflict(replies)) == conflict


def test_a_commit_inside_a_step_is_seen_by_the_worker(checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"]).requires_grad_(False)
    backend = TorchBackend(model, WorkerId("test", 0), version=0)
    stepper = Stepper(model, backend, torch.device("cpu"), samples=True)
    job = Job(request=1, tokens=[5, 6, 7], fresh=True, temperature=0.0, seed=0, position=3)
    assert not version_conflict([stepper.step(Step([job], []))])

    def commit(*_: object) -> None:
        with backend.commit_scope():
            pass

    hook = model.model.layers[1].register_forward_pre_hook(commit)
    assert version_conflict([stepper.step(Step([job], []))])
    hook.remove()
    assert not version_conflict([stepper.step(Step([job], []))])
    stepper.step(Step([], [1]))
    assert stepper.num_caches == 0


def test_spans_of_versions() -> None:
    assert version_spans([]) == []
    assert version_spans([0, 0, 3, 3, 3, 4]) == [(0, 0, 2), (3, 2, 5), (4, 5, 6)]


def test_a_request_feeds_everything_once_and_then_the_last_token() -> None:
    events: list[TokenMade | Finished] = []
    request = Request(1, [7, 8], Sampling(max_tokens=3), events.append)
    assert request.job().tokens == [7, 8]
    assert request.accept(9, 0, frozenset()) is None
    assert (request.job().tokens, request.job().fresh, request.job().position) == ([9], False, 3)
    request.cached = False
    assert (request.job().tokens, request.job().fresh) == ([7, 8, 9], True)
    assert request.accept(10, 1, frozenset({10})) == "stop"
    assert request.accept(11, 1, frozenset()) == "length"
    assert request.versions == [0, 1, 1]


def test_sampling_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(64, generator=torch.Generator().manual_seed(1))

    def draw(seed: int, position: int, temperature: float = 1.0) -> int:
        return sample(logits, Job(1, [1], False, temperature, seed, position))

    drawn = [draw(3, position) for position in range(20)]
    assert drawn == [draw(3, position) for position in range(20)]
    assert drawn != [draw(4, position) for position in range(20)]
    assert len(set(drawn)) > 5
    assert {draw(seed, 0, 0.0) for seed in range(5)} == {int(logits.argmax())}


def test_text_arrives_whole_and_equal_to_one_decode(checkpoints: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen3"])
    for text in ("the river turns the wheel", "Grüße — 水 flows", "  two  spaces"):
        tokens = tokenizer.encode(text)
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in tokens]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(tokens) == text
        assert not any("\ufffd" in piece for piece in pieces)
