"""The demo from begin to end: an engine under load, updates from checkpoints and a trainer, and the proofs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from headrace.ceiling import CopyCeiling, measure_copy_ceiling
from headrace.config import UpdateSettings
from headrace.demo.proofs import (
    Proof,
    Weights,
    Window,
    named,
    replay_proof,
    requests_proof,
    versions_proof,
    weight_differences,
)
from headrace.demo.streams import Gap, Prompt, StreamedRequest, Streams, gaps
from headrace.demo.trainer import Trainer
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer
from headrace.telemetry import Span
from headrace.testing.engine_process import EngineProcess
from headrace.testing.tiny_model import SENTENCES, TinySize, make_tiny_qwen3
from headrace.types import RouteName

SIZE = TinySize(num_layers=6, hidden=256, intermediate=768, num_heads=16, num_kv_heads=4)
CHECKPOINTS = ("a", "b", "c")
STEPS_PER_UPDATE = 4
READY_S, TOKENS_S, FINISH_S = 120.0, 30.0, 60.0
_SETTLE_TOKENS = 6
_PROMPT_WORDS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """Choices of one demo.

    Attributes:
        tp: Worker processes of the engine.
        device: `cpu` or `cuda`.
        seed: Source of weights and prompts.
        num_updates: The first half from checkpoints, the rest from a trainer.
        num_requests: Requests that run at once.
    """

    tp: int = 2
    device: str = "cpu"
    seed: int = 0
    num_updates: int = 6
    num_requests: int = 4


class Watcher(Protocol):
    """Who is told how far the demo is."""

    def say(self, text: str) -> None:
        """Hear what is done now."""
        ...

    def counted(self, updates: int, tokens: int) -> None:
        """Hear how much was done so far."""
        ...

    def moved(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """Hear how far an update is."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One planned update: from which checkpoint (or, where empty, from the trainer), and how."""

    checkpoint: str
    route: RouteName


@dataclass(frozen=True, kw_only=True)
class AppliedUpdate:
    """One update and what was seen of it from outside.

    Attributes:
        source: Where the weights came from, for people.
        route: What was asked for.
        report: What Headrace says.
        window: When it ran.
        weights: The source's tensors as they were published.
        differences: Shards of workers that are not equal to the source, bit for bit.
        losses: Loss of each optimizer step before it.
    """

    source: str
    route: RouteName
    report: UpdateReport
    window: Window
    weights: Weights
    differences: list[str]
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything the demo found.

    Attributes:
        model_bytes: Size of one version.
        updates: In order.
        longest_gap_s: Per update, the longest time between two tokens of one request that fell into it.
        usual_gap_s: Median time between two tokens of one request outside of updates.
        ceiling: Memory-copy ceiling of the same run; None on GPUs.
        requests: Every request.
        proofs: Every claim.
        seconds: Length of the demo.
    """

    model_bytes: int
    updates: Sequence[AppliedUpdate]
    longest_gap_s: Sequence[float]
    usual_gap_s: float
    ceiling: CopyCeiling | None
    requests: Sequence[StreamedRequest]
    proofs: Sequence[Proof]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every claim held."""
        return all(proof.ok for proof in self.proofs)

    @property
    def spans(self) -> list[Span]:
        """Everything that was timed: updates, and each request as its client saw it."""
        spans = [span for update in self.updates for span in update.report.spans]
        for request in self.requests:
            if request.times_s:
                length_s = request.times_s[-1] - request.times_s[0]
                spans.append(Span("request", f"stream {request.stream}", request.times_s[0], length_s))
        return spans


def schedule(num_updates: int) -> list[Step]:
    """Return the updates to make: direct and broadcast in turn, checkpoints b and c first, then the trainer."""
    from_checkpoints = (num_updates + 1) // 2
    return [
        Step(
            checkpoint="bc"[number % 2] if number < from_checkpoints else "",
            route="broadcast" if number % 2 else "direct",
        )
        for number in range(num_updates)
    ]


def run_demo(settings: DemoSettings, folder: Path, watcher: Watcher) -> Outcome:
    """Run the demo with its files in `folder`; no process is left when this returns or raises. Blocking.

    Raises:
        HeadraceError: The engine did not start, or an update failed.
    """
    begin = time.monotonic()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        story = _Story(settings, folder, watcher, stack)
        for number, step in enumerate(schedule(settings.num_updates)):
            story.update(number, step)
        return story.end(begin)


class _Story:
    """What lives as long as one demo does."""

    def __init__(self, settings: DemoSettings, folder: Path, watcher: Watcher, stack: ExitStack) -> None:
        self._settings = settings
        self._folder = folder
        self._watcher = watcher
        self._stack = stack
        self._servers: dict[str, ParameterServer] = {}
        self._trainer: Trainer | None = None
        self._last_checkpoint = "a"
        self._applied: list[AppliedUpdate] = []
        self._make("a")
        log = folder / "engine.log"
        self._engine = stack.enter_context(
            EngineProcess(folder / "a", settings.tp, "--device", settings.device, log=log, wait=False)
        )
        for name in CHECKPOINTS[1:]:
            self._make(name)
        self._tokenizer = Tokenizer.from_file(str(folder / "a" / "tokenizer.json"))
        watcher.say("starting the engine")
        self._engine.wait_ready(READY_S)
        watcher.say("the first tokens")
        prompts = [self._prompt(sentence) for sentence in SENTENCES]
        self._streams = Streams(self._engine.url, prompts, settings.num_requests, settings.seed)
        stack.callback(self._streams.cancel)
        self._streams.start()
        self._settle()

    def update(self, number: int, step: Step) -> None:
        """Apply one update under load and compare what the workers hold afterwards."""
        losses = [] if step.checkpoint else self._train()
        self._watcher.say(f"update {number + 1}: {self._source(step, losses)}, {step.route}")
        server, weights = self._server(step), self._weights(step)
        begin = time.monotonic()
        report = server.update(
            self._engine.target, UpdateSettings(route=step.route), progress=self._watcher.moved
        )
        window = Window(report.version, begin, time.monotonic())
        self._settle()
        self._watcher.say(f"comparing version {report.version} with its source")
        self._applied.append(AppliedUpdate(
            source=self._source(step, losses),
            route=step.route,
            report=report,
            window=window,
            weights=weights,
            differences=weight_differences(self._engine.get("/headrace/fingerprints"), weights),
            losses=losses,
        ))  # fmt: skip
        self._settle()

    def end(self, begin: float) -> Outcome:
        """Let the last requests end, measure the ceiling, and prove."""
        self._watcher.say("waiting for the last requests")
        self._streams.finish(FINISH_S)
        requests, windows = self._streams.requests, [update.window for update in self._applied]
        self._watcher.say("measuring the memory-copy ceiling")
        ceiling = self._ceiling()
        self._watcher.say("computing the tokens again from the sources")
        weights: dict[int, Weights] = {0: load_file(self._folder / "a" / "model.safetensors")}
        weights |= {update.report.version: update.weights for update in self._applied}
        proofs = [
            self._weights_proof(),
            requests_proof(requests),
            versions_proof(requests, windows, self._engine.get("/health")),
            replay_proof(requests, weights, self._folder / "a"),
        ]
        every = list(gaps(requests))
        return Outcome(
            model_bytes=_num_bytes(weights[0]),
            updates=self._applied,
            longest_gap_s=[_longest(every, window) for window in windows],
            usual_gap_s=_usual(every, windows),
            ceiling=ceiling,
            requests=requests,
            proofs=proofs,
            seconds=time.monotonic() - begin,
        )

    def _make(self, name: str) -> None:
        self._watcher.say(f"making checkpoint {name}")
        seed = 1000 * self._settings.seed + CHECKPOINTS.index(name)
        make_tiny_qwen3(self._folder / name, seed, size=SIZE)

    def _prompt(self, sentence: str) -> Prompt:
        text = " ".join(sentence.split()[:_PROMPT_WORDS])
        return Prompt(text, self._tokenizer.encode(text).ids)

    def _settle(self) -> None:
        """Wait for a few tokens of every stream, so that what was done is behind the engine."""
        self._streams.wait_tokens(_SETTLE_TOKENS, TOKENS_S)
        self._watcher.counted(len(self._applied), self._streams.num_tokens)

    def _server(self, step: Step) -> ParameterServer:
        """Return the parameter server of a checkpoint, or the trainer's; each is kept until the end."""
        if step.checkpoint not in self._servers:
            folder = self._folder / step.checkpoint if step.checkpoint else None
            tensors = self._trainer.tensors if self._trainer and not step.checkpoint else None
            server = ParameterServer(folder, tensors=tensors)
            self._servers[step.checkpoint] = self._stack.enter_context(server)
        return self._servers[step.checkpoint]

    def _weights(self, step: Step) -> Weights:
        if step.checkpoint or self._trainer is None:
            self._last_checkpoint = step.checkpoint
            return load_file(self._folder / step.checkpoint / "model.safetensors")
        return self._trainer.snapshot()

    def _train(self) -> list[float]:
        if self._trainer is None:
            self._watcher.say("starting the trainer")
            folder = self._folder / self._last_checkpoint
            sentences = [self._tokenizer.encode(sentence).ids for sentence in SENTENCES]
            self._trainer = Trainer(folder, sentences, self._settings.device)
        self._watcher.say(f"training, {STEPS_PER_UPDATE} optimizer steps")
        return [self._trainer.step() for _ in range(STEPS_PER_UPDATE)]

    def _source(self, step: Step, losses: Sequence[float]) -> str:
        if step.checkpoint or self._trainer is None:
            return f"checkpoint {step.checkpoint}"
        return f"trainer step {len(self._trainer.losses)}, loss {losses[-1]:.2f}"

    def _ceiling(self) -> CopyCeiling | None:
        if self._settings.device != "cpu" or not self._applied:
            return None
        each = max(worker.live_bytes for worker in self._applied[-1].report.workers)
        return measure_copy_ceiling(self._settings.tp, each)

    def _weights_proof(self) -> Proof:
        num_tensors = len(self._applied[0].weights) if self._applied else 0
        return Proof(
            name="bit_equal",
            claim=f"all {self._settings.tp} workers held the source's weights bit for bit after every one of "
            f"{len(self._applied)} updates ({num_tensors} tensors, sha256)",
            problems=[
                f"version {update.report.version}: {named(update.differences)}"
                for update in self._applied
                if update.differences
            ],
            details={"updates": len(self._applied), "workers": self._settings.tp, "tensors": num_tensors},
        )


def _num_bytes(weights: Weights) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def _longest(every: Sequence[Gap], window: Window) -> float:
    return max((g.length_s for g in every if g.overlaps(window.begin_s, window.end_s)), default=0.0)


def _usual(every: Sequence[Gap], windows: Sequence[Window]) -> float:
    outside = [g.length_s for g in every if not any(g.overlaps(w.begin_s, w.end_s) for w in windows)]
    return median(outside) if outside else 0.0
