"""One rank of a GRPO loop: rollouts from a live engine, a reward, a step, and the engine has the new policy.

Started by `run.py`, or by hand: `torchrun --nproc-per-node 2 train.py --model DIR --engine torch=http://HOST:PORT`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("the river", "fresh", "a small model", "every stone", "in the morning", "at night", "nobody", "new")
WANTED = ("river", "water", "boats", "channel", "stream", "mill", "wheel", "bank")
GROUP = 8
LENGTH = 12


@dataclass
class Rollout:
    """One completion: its tokens, which of them the engine chose, and the version of the policy that chose them."""

    tokens: list[int]
    num_prompt: int
    version: int | None
    reward: float = 0.0


class Engine:
    """Completions from an engine that speaks `/v1/completions`."""

    def __init__(self, target: str) -> None:
        self._client = httpx.Client(base_url=target.partition("=")[2], timeout=120, trust_env=False)
        self._model = self._client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        self._pool = ThreadPoolExecutor(16)

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[Rollout]:
        """Return one rollout per prompt."""
        return list(self._pool.map(self._one, prompts, range(seed, seed + len(prompts))))

    def _one(self, prompt: list[int], seed: int) -> Rollout:
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": LENGTH, "temperature": 1.0, "seed": seed}
        body |= {"ignore_eos": True, "return_token_ids": True, "model": self._model}
        answer = self._client.post("/v1/completions", json=body).raise_for_status().json()
        choice = answer["choices"][0]
        return Rollout([*prompt, *choice["token_ids"]], len(prompt), choice.get("weight_version"))


def rewards(rollouts: Sequence[Rollout], wanted: set[int]) -> torch.Tensor:
    """Return the share of tokens that begin a word about water, per rollout."""
    for one in rollouts:
        chosen = one.tokens[one.num_prompt :]
        one.reward = sum(token in wanted for token in chosen) / len(chosen)
    return torch.tensor([one.reward for one in rollouts])


def advantages(reward: torch.Tensor) -> torch.Tensor:
    """Return how much better each rollout is than the others on its prompt, in standard deviations."""
    groups = reward.view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def policy_loss(model: Any, rollouts: Sequence[Rollout], advantage: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Return minus the advantage-weighted log-probability of the tokens that the engine chose."""
    width = max(len(one.tokens) for one in rollouts)
    ids = torch.tensor([one.tokens + [0] * (width - len(one.tokens)) for one in rollouts])
    place = torch.arange(1, width)
    chosen = torch.stack([(place >= one.num_prompt) & (place < len(one.tokens)) for one in rollouts])
    logits = model(input_ids=ids).logits[:, :-1].float()
    logprobs = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return -(advantage[:, None] * logprobs * chosen).sum() / chosen.sum()


def make_trainer(framework: str, folder: str, rate: float) -> tuple[Any, Any]:
    """Return a model and what steps it: FSDP2 and its optimizer, or a DeepSpeed engine twice."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if framework == "deepspeed":
        import deepspeed  # noqa: PLC0415 - only where it is asked for

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": rate, "torch_adam": True}},
            "zero_optimization": {"stage": 3},
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        return engine, engine
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=rate)


def attach(framework: str, model: Any, stepper: Any, engine: str) -> Any:  # noqa: ANN401
    """Return the hook: the only lines that a training script needs."""
    if framework == "deepspeed":
        from headrace_trainers import deepspeed as hooks  # noqa: PLC0415

        return hooks.attach(model, to=engine, mode="wait", on_error="raise")
    from headrace_trainers import fsdp  # noqa: PLC0415

    return fsdp.attach(model, stepper, to=engine, mode="wait", on_error="raise")


def step(framework: str, model: Any, stepper: Any, loss: torch.Tensor) -> None:  # noqa: ANN401
    """Take one optimizer step; when it returns, the engine serves its weights."""
    if framework == "deepspeed":
        model.backward(loss)
        model.step()
        return
    stepper.zero_grad()
    loss.backward()
    stepper.step()


def main() -> None:
    """Train, and write what happened, step by step, as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--framework", choices=("fsdp", "deepspeed"), default="fsdp")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    wanted = {i for text, i in tokenizer.get_vocab().items() if text.lstrip("\u0120").startswith(WANTED)}
    prompts = [tokenizer.encode(text) for text in PROMPTS[rank::ranks] for _ in range(GROUP)]
    model, stepper = make_trainer(chosen.framework, chosen.model, chosen.rate)
    engine = Engine(chosen.engine)
    with attach(chosen.framework, model, stepper, chosen.engine), chosen.out.open("w") as out:
        for number in range(1, chosen.steps + 1):
            begin = time.monotonic()
            rollouts = engine.sample(prompts, seed=1_000_000 * rank + 1000 * number)
            sampled = time.monotonic()
            reward = rewards(rollouts, wanted)
            step(chosen.framework, model, stepper, policy_loss(model, rollouts, advantages(reward)))
            mean = reward.mean()
            dist.all_reduce(mean)
            line = {"step": number, "reward": float(mean) / ranks, "rollout_s": sampled - begin}
            line |= {"step_s": time.monotonic() - sampled, "versions": sorted({one.version or 0 for one in rollouts})}
            if rank == 0:
                out.write(json.dumps(line) + "\n")
                out.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
