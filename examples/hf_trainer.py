"""Hugging Face's Trainer teaches a tiny model its sentences while a live engine serves every step of it.

    pip install './packages/core[engine]' './packages/trainer-hooks[hf]'
    python examples/hf_trainer.py

The same request is answered again and again while training goes on: each answer says which version it is of.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from headrace.testing.engine_process import EngineProcess
from headrace.testing.tiny_model import SENTENCES, make_tiny_qwen3
from headrace_trainers.transformers import attach


class Ask(TrainerCallback):
    """Asks the engine to go on with a sentence, every few steps."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:  # noqa: ANN401
        if state.global_step % 10 == 0:
            body = {"prompt": "the river turns", "max_tokens": 9, "temperature": 0}
            choice = self._client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
            print(f"step {state.global_step:3}  version {choice['weight_version']}  the river turns{choice['text']}")


def main() -> None:
    """Train for 60 steps."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_qwen3(Path(scratch) / "model", 3)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = [torch.tensor(tokenizer.encode(text)[:10]) for text in SENTENCES] * 8
        data = [{"input_ids": row, "labels": row} for row in rows]
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=20,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        with EngineProcess(folder, 1, "--dtype", "float32") as engine:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Ask(engine.url)])
            attach(trainer, to=engine.target, mode="wait")
            trainer.train()


if __name__ == "__main__":
    main()
