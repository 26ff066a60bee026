"""A real SGLang server in processes of its own, and what is asked of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.testing.engine_process import free_port
from headrace.testing.server_process import ServerProcess

START_S = 170.0
SUPPORT = Path(__file__).parent
QUIET = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HEADRACE_SGLANG_ON_CPU": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
SMALL = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "mem_fraction_static": 0.2,
    "max_total_tokens": 4096,
    "dtype": "float32",
    "sleep_on_idle": True,
}


def environment(num_workers: int = 1) -> dict[str, str]:
    """Return the variables that SGLang needs on this machine; workers are bound to cores in turn."""
    cores = sorted(os.sched_getaffinity(0))
    bound = "|".join(str(cores[i % len(cores)]) for i in range(num_workers))
    path = os.pathsep.join(filter(None, (str(SUPPORT / "cpu"), str(SUPPORT), os.environ.get("PYTHONPATH"))))
    tied = {"SGLANG_CPU_OMP_THREADS_BIND": bound} if num_workers > 1 else {}
    return os.environ | QUIET | tied | {"PYTHONPATH": path}


def flags(options: Mapping[str, Any]) -> list[str]:
    """Return options of an `Engine` as flags of a server."""
    found = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        found += [flag] if value is True else [flag, str(value)]
    return found


class SglangServer(ServerProcess):
    """One server; ready when constructed. Use as a context.

    Args:
        model: Folder of the model.
        options: Further flags of the server.
        log: File that its output goes to.
        workers: How many schedulers the flags ask for.
        port: Port to listen on; None takes a free one.
        variables: Further variables of its environment.
        key: API key that it asks for.

    Attributes:
        replica: Which data-parallel engine answers; None leaves it to SGLang.
    """

    replica: int | None = None

    def __init__(
        self,
        model: Path,
        *options: str,
        log: Path,
        workers: int = 1,
        port: int | None = None,
        variables: Mapping[str, str] | None = None,
        key: str = "",
    ) -> None:
        port = port or free_port()
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), *flags(SMALL), *options]
        command += ["--api-key", key] if key else []
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        known = environment(workers) | dict(variables or {})
        super().__init__(command, port, environment=known, log=log, headers=headers, own_group=True)
        self.target = f"sglang={self.url}"
        self.wait_ready(START_S)

    def generate(self, prompt: list[int], max_tokens: int, **sampling: Any) -> dict[str, Any]:
        """Return one greedy answer: `tokens`, `logprobs`, and the version of every token."""
        chosen = {"temperature": 0.0, "max_new_tokens": max_tokens, "ignore_eos": True} | sampling
        body: dict[str, Any] = {"input_ids": prompt, "sampling_params": chosen, "return_logprob": True}
        body |= {} if self.replica is None else {"routed_dp_rank": self.replica}
        answer = self.client.post("/generate", json=body)
        answer.raise_for_status()
        return answer_of(answer.json())

    def version(self) -> str:
        """Return SGLang's own weight version."""
        return str(self.client.get("/model_info").json()["weight_version"])

    def close(self) -> None:
        """End it at once: told to end, it waits for its requests; idempotent."""
        self.kill()
        super().close()


def answer_of(out: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tokens`, `logprobs` and `versions` of one answer of SGLang."""
    meta, tokens = out["meta_info"], out["output_ids"]
    versions: list[str] = [""] * len(tokens)
    for span in meta["weight_versions"]:
        versions[span["start"] : span["end"]] = [span["version"]] * (span["end"] - span["start"])
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    return {"tokens": tokens, "logprobs": logprobs, "versions": versions}
