"""EmbeddedEngine with real worker processes: tokens, pause and resume, lost workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest
import torch
from transformers import AutoModelForCausalLM

from headrace.embedded.engine import EmbeddedEngine
from headrace.embedded.generation import Event, Finished, Sampling, TokenMade
from headrace.embedded.settings import EngineSettings
from headrace.errors import ConfigError, HeadraceError, LocalProtocolError, PeerLostError

StartEngine = Callable[..., EmbeddedEngine]

PROMPTS = ([5, 300, 301], [400], [310, 320, 330, 340, 350], [290, 291])
GREEDY = Sampling(max_tokens=24, ignore_stop=True)


def reference(folder: Path, prompt: list[int], num_tokens: int = 24) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


def tokens_of(engine: EmbeddedEngine, prompt: list[int], sampling: Sampling = GREEDY) -> list[int]:
    return [made.token for made in engine.generate(prompt, sampling)]


def drain(events: SimpleQueue[Event]) -> list[Event]:
    taken: list[Event] = []
    while True:
        try:
            taken.append(events.get_nowait())
        except Empty:
            return taken


def wait_gone(pids: list[int], deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.02)
    pytest.fail(f"processes {pids} are still there")


@pytest.mark.parametrize(("kind", "tp"), [("qwen3", 1), ("qwen3", 2), ("qwen3_moe", 2)])
def test_greedy_tokens_are_those_of_transformers(
    checkpoints: dict[str, Path], shared_engine: StartEngine, kind: str, tp: int
) -> None:
    engine = shared_engine(checkpoints[kind], tp=tp)
    made: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: made.update({i: tokens_of(engine, p)}))
        for i, p in enumerate(PROMPTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert made == {i: reference(checkpoints[kind], prompt) for i, prompt in enumerate(PROMPTS)}
    assert engine.health()["mixed_steps"] == 0
    assert engine.health()["num_requests"] == 0


@pytest.mark.parametrize("cache", ["recompute", "keep"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_pause_keeps_requests_and_changes_no_token(
    checkpoints: dict[str, Path], shared_engine: StartEngine, tp: int, cache: str
) -> None:
    engine = shared_engine(checkpoints["qwen3"], tp=tp)
    sampling = Sampling(max_tokens=150, ignore_stop=True)
    wanted = tokens_of(engine, PROMPTS[0], sampling)
    events: SimpleQueue[Event] = SimpleQueue()
    request = engine.submit(PROMPTS[0], sampling, events.put)
    first = [events.get(timeout=10) for _ in range(3)]
    engine.pause(cache, 10.0)  # type: ignore[arg-type]
    engine.pause(cache, 10.0)  # type: ignore[arg-type]
    first += drain(events)
    late = SimpleQueue[Event]()
    engine.submit(PROMPTS[1], Sampling(max_tokens=1), late.put)
    time.sleep(0.3)
    assert (drain(events), drain(late)) == ([], [])
    health = engine.health()
    assert (health["paused"], health["num_requests"]) == (True, 2)
    caches = [rank["num_caches"] for rank in engine.status()["ranks"]]
    assert caches == [0 if cache == "recompute" else 1] * tp
    engine.resume()
    engine.resume()
    while not isinstance(event := events.get(timeout=30), Finished):
        first.append(event)
    assert len(first) == 150
    assert request.tokens == wanted
    assert isinstance(late.get(timeout=10), TokenMade)


class YieldingCondition(threading.Condition):
    """Lets all others go first whenever the engine's loop has let go of it."""

    def __exit__(self, *told: object) -> None:
        super().__exit__(*told)  # type: ignore[arg-type]
        if threading.current_thread().name == "engine-loop":
            time.sleep(0.02)


def test_a_pause_between_a_step_and_its_tokens_drops_no_cache_that_is_thought_kept(
    checkpoints: dict[str, Path],
) -> None:
    engine = EmbeddedEngine(EngineSettings(model=checkpoints["qwen3"], start_s=60.0, step_s=20.0))
    engine._changed = YieldingCondition()
    engine.start()
    try:
        engine.wait_ready(60.0)
        made = []
        for token in engine.generate(PROMPTS[0], GREEDY):
            made.append(token.token)
            if len(made) == 10:
                while not engine._is_stepping:
                    time.sleep(0.001)
                engine.pause("recompute", 10.0)
                engine.resume()
        assert made == reference(checkpoints["qwen3"], PROMPTS[0])
    finally:
        engine.stop()


def test_seeded_samples_repeat_across_a_pause(
    checkpoints: dict[str, Path], shared_engine: StartEngine
) -> None:
    engine = shared_engine(checkpoints["qwen3"], tp=1)
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=5, ignore_stop=True)
    wanted = tokens_of(engine, PROMPTS[2], sampling)
    made = []
    for token in engine.generate(PROMPTS[2], sampling):
        made.append(token.token)
        if len(made) == 10:
            engine.pause("recompute", 10.0)
            engine.resume()
    assert made == wanted
    assert made != tokens_of(
        engine, PROMPTS[2], Sampling(max_tokens=40, temperature=1.0, seed=6, ignore_stop=True)
    )


def test_a_cancelled_request_frees_its_place(checkpoints: dict[str, Path], start_engine: StartEngine) -> None:
    engine = start_engine(checkpoints["qwen3"], max_running=1)
    endless = engine.generate(PROMPTS[0], Sampling(max_tokens=2000, ignore_stop=True))
    next(endless)
    endless.close()
    assert tokens_of(engine, PROMPTS[1]) == reference(checkpoints["qwen3"], PROMPTS[1])


def test_a_killed_worker_fails_requests_at_once(
    checkpoints: dict[str, Path], start_engine: StartEngine
) -> None:
    engine = start_engine(checkpoints["qwen3"], tp=2)
    pids = [rank["pid"] for rank in engine.status()["ranks"]]
    stream = engine.generate(PROMPTS[0], Sampling(max_tokens=2000, ignore_stop=True))
    next(stream)
    os.kill(pids[1], signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises(PeerLostError, match=r"worker 1 \(pid \d+\) was ended by SIGKILL"):
        list(stream)
    assert time.monotonic() - killed_at < 5
    wait_gone(pids)
    health = engine.health()
    assert (health["status"], health["num_requests"]) == ("failed", 0)
    assert "SIGKILL" in health["reason"]
    for call in (
        lambda: engine.submit([5], GREEDY, print),
        lambda: engine.pause("keep", 1.0),
        engine.resume,
        engine.status,
    ):
        with pytest.raises(PeerLostError):
            call()


def test_an_idle_worker_that_dies_is_noticed(checkpoints: dict[str, Path], start_engine: StartEngine) -> None:
    engine = start_engine(checkpoints["qwen3"])
    os.kill(engine.status()["ranks"][0]["pid"], signal.SIGKILL)
    end = time.monotonic() + 5
    while engine.health()["status"] == "ready" and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.health()["status"] == "failed"


@pytest.mark.parametrize("tp", [1, 2])
def test_a_dummy_start_is_paused_until_its_first_update(
    checkpoints: dict[str, Path], start_engine: StartEngine, tp: int
) -> None:
    engine = start_engine(checkpoints["qwen3"], tp=tp, load_format="dummy")
    events: SimpleQueue[Event] = SimpleQueue()
    engine.submit([5], GREEDY, events.put)
    with pytest.raises(LocalProtocolError, match="dummy weights"):
        engine.resume()
    status = engine.status()
    assert (status["paused"], status["weight_version"], status["world_size"]) == (True, None, tp)
    assert drain(events) == []


def test_a_start_that_fails_says_why(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoints["qwen3"] / "config.json").read_bytes())
    engine = EmbeddedEngine(EngineSettings(model=tmp_path, start_s=60.0))
    engine.start()
    try:
        with pytest.raises(HeadraceError, match=r"worker 0: .*safetensors"):
            engine.wait_ready(60.0)
        assert "safetensors" in engine.health()["reason"]
    finally:
        engine.stop()


def test_settings_and_prompts_are_checked(checkpoints: dict[str, Path], start_engine: StartEngine) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        EngineSettings(model=Path("/nowhere"))
    for field, value in (("tp", 0), ("device", "tpu"), ("load_format", "lazy"), ("port", 99999)):
        with pytest.raises(ConfigError, match=field):
            EngineSettings(model=checkpoints["qwen3"], **{field: value})  # type: ignore[arg-type]
    engine = start_engine(checkpoints["qwen3"])
    assert reference(checkpoints["qwen3"], [5], 1) == tokens_of(engine, [5], Sampling(max_tokens=1))
    for prompt, sampling in (([], GREEDY), ([100_000], GREEDY), ([5], Sampling(max_tokens=5000))):
        with pytest.raises(ConfigError):
            engine.submit(prompt, sampling, print)
    pids = [rank["pid"] for rank in engine.status()["ranks"]]
    engine.stop()
    wait_gone(pids)
    with pytest.raises(LocalProtocolError, match="stopped"):
        engine.submit([5], GREEDY, print)
