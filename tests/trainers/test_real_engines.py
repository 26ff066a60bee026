"""FSDP2 with tensor parallelism, and ZeRO-3, into a real vLLM and a real SGLang server with two workers each.

An engine cannot be installed beside every trainer: its Python is named by HEADRACE_VLLM_PYTHON, HEADRACE_SGLANG_PYTHON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="trainers need transformers")

import torch
from oracle import Oracle
from safetensors.torch import save_file
from trainer_world import batch, join

from headrace.config import UpdateSettings
from headrace.testing.engine_process import free_port
from headrace.testing.ranks import run_ranks
from headrace.testing.tiny_model import TinySize, make_tiny_qwen3

SIZE = TinySize(hidden=80, intermediate=104, num_heads=4, num_kv_heads=2, head_dim=32)
PROMPT = [20, 31, 42, 53, 64, 75]
STEPS = 2
PYTHONS = {kind: os.environ.get(f"HEADRACE_{kind.upper()}_PYTHON", "") for kind in ("vllm", "sglang")}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]


class Server:
    """An engine in its own Python; ready when constructed."""

    def __init__(self, kind: str, model: Path, log: Path) -> None:
        serve = Path(__file__).parent / "support" / "serve.py"
        self.process = subprocess.Popen(
            [PYTHONS[kind], str(serve), kind, str(model), "2", str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.target = self.process.stdout.readline().strip()
        assert self.target, f"{kind} did not start:\n{log.read_text(errors='replace')[-3000:]}"

    def generate(self, prompt: list[int]) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(prompt) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), 7, size=SIZE)


@pytest.fixture(scope="module", params=PYTHONS)
def server(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    kind = request.param
    if not Path(PYTHONS[kind]).is_file():
        pytest.skip(f"needs HEADRACE_{kind.upper()}_PYTHON; `nox -s {kind}` makes one")
    made = Server(kind, folder, tmp_path_factory.mktemp("log") / f"{kind}.log")
    yield made
    made.close()


def train(rank: int, world_size: int, port: int, target: str, folder: Path, out: Path, name: str) -> list[int]:
    """Train, every step into the engine, every byte compared there; the weights of the last step go to `out`."""
    join(rank, world_size, port)
    versions: list[int] = []

    def note(report: Any) -> None:
        versions.append(report.update.version)

    choices: dict[str, Any] = {"to": target, "mode": "wait", "on_error": "raise", "report": note}
    choices["update"] = UpdateSettings(verify="full")
    if name == "zero3":
        from deepspeed_layouts import make

        from headrace_trainers import deepspeed

        trainer = make(folder, 3, bf16=False)
        hook = deepspeed.attach(trainer.model, **choices)
    else:
        from torch_layouts import LAYOUTS

        from headrace_trainers import fsdp

        trainer = LAYOUTS[name](folder)
        hook = fsdp.attach(trainer.model, trainer.optimizer, **choices)
    with hook:
        for step in range(1, STEPS + 1):
            trainer.step(batch(step, rank // 2 if name == "fsdp2-tp" else rank))
        whole = trainer.whole()
    if rank == 0:
        save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
    return versions


@pytest.mark.parametrize(("name", "num_ranks"), [("fsdp2-tp", 4), ("zero3", 2)])
def test_a_real_server_answers_as_the_trained_model(
    server: Server, folder: Path, tmp_path: Path, name: str, num_ranks: int
) -> None:
    if name == "zero3":
        pytest.importorskip("deepspeed", reason="the session `trainers` of nox installs DeepSpeed")
    torch.set_num_threads(1)
    trained = tmp_path / "trained"
    shutil.copytree(folder, trained)
    versions = run_ranks(train, num_ranks, 200, free_port(), server.target, folder, trained, name)[0]
    assert len(versions) == STEPS
    answer = server.generate(PROMPT)
    assert Oracle({"now": trained}).problems(PROMPT, answer, ["now"] * 12) == []
    if any(answer["versions"]):
        assert set(answer["versions"]) == {str(versions[-1])}
