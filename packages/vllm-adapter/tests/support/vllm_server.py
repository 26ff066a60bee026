"""A real vLLM server in processes of its own, and what is asked of it."""

from __future__ import annotations

import os
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from vllm_variables import QUIET

from headrace.testing.engine_process import free_port
from headrace.testing.server_process import ServerProcess


def find_version() -> str:
    """Return the version of the vLLM that is installed, under whatever name."""
    names = packages_distributions()["vllm"]
    return version(names[0])


START_S = 150.0
SUPPORT = Path(__file__).parent
SERVER = "vllm.entrypoints.openai.api_server"
TRANSFER = '{"backend":"headrace"}'
INSTALLED = tuple(int(part) for part in find_version().split(".")[:2])
REPORTS_VERSIONS = INSTALLED >= (0, 30)
"""Whether this vLLM is known to tell the version that it serves; from 0.32 on, that of each token too."""
NEEDS_SCALE_OUT = INSTALLED >= (0, 30)
"""Whether answers to token ids have to be asked for when the server starts."""
SMALL = (
    "--enforce-eager",
    "--kv-cache-memory-bytes",
    "67108864",
    "--max-model-len",
    "512",
    "--dtype",
    "float32",
)


class VllmServer(ServerProcess):
    """One server; ready when constructed. Use as a context.

    Args:
        model: Folder of the model.
        options: Further options of the server.
        extension: Take tickets by the worker extension instead of the weight-transfer engine.
        unpacked: Keep live weights in the loader's layout.
        dev_mode: Whether the routes for updates exist.
        log: File that its output goes to.
        port: Port to listen on; None takes a free one.
        batches_ahead: Batches that are handed out before tokens are taken; of unpacked servers with the extension.
    """

    def __init__(
        self,
        model: Path,
        *options: str,
        log: Path,
        extension: bool = False,
        unpacked: bool = False,
        dev_mode: bool = True,
        port: int | None = None,
        batches_ahead: int | None = None,
    ) -> None:
        port = port or free_port()
        doors = (
            ("--worker-extension-cls", "headrace_vllm.WorkerExtension")
            if extension
            else ("--weight-transfer-config", TRANSFER)
        )
        doors += ("--worker-extension-cls", "nopack.Unpacked") if unpacked and not extension else ()
        launched = [str(SUPPORT / "unpacked_server.py")] if unpacked and extension else ["-m", SERVER]
        command = [sys.executable, *launched, "--model", str(model)]
        command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), *SMALL]
        command += [*(("--enable-scale-out",) if NEEDS_SCALE_OUT else ()), *doors, *options]
        path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
        variables = QUIET | {"PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1" if dev_mode else "0"}
        variables |= {"BATCHES_AHEAD": str(batches_ahead)} if batches_ahead else {}
        super().__init__(command, port, environment=os.environ | variables, log=log, own_group=True)
        self.target = f"vllm={self.url}"
        self.wait_ready(START_S)

    def generate(self, prompt: list[int], max_tokens: int, **sampling: Any) -> dict[str, Any]:
        """Return one greedy answer: `tokens`, `logprobs`, and the version of every token."""
        chosen = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 1} | sampling
        body = {"model": "m", "token_ids": prompt, "sampling_params": chosen, "stream": False}
        answer = self.client.post("/inference/v1/generate", json=body)
        answer.raise_for_status()
        choice = answer.json()["choices"][0]
        versions: list[str] = [""] * len(choice["token_ids"])
        for span in choice.get("weight_versions") or ():
            versions[span["start"] : span["end"]] = [span["version"]] * (span["end"] - span["start"])
        logprobs = [entry["logprob"] for entry in (choice["logprobs"] or {"content": []})["content"]]
        return {"tokens": choice["token_ids"], "logprobs": logprobs, "versions": versions}

    def version(self) -> str:
        """Return vLLM's own weight version, empty where it knows none."""
        if not REPORTS_VERSIONS:
            return ""
        return str(self.client.get("/weight_info").json()["weight_version"])
