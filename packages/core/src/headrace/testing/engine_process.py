"""EngineProcess: `headrace engine` as a real server in a process of its own, and streaming clients of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import torch
from safetensors.torch import load_file

from headrace.errors import ConnectError, RemoteProtocolError
from headrace.testing.server_process import ServerProcess


class EngineProcess(ServerProcess):
    """An embedded engine with an HTTP server, ready when constructed. Use as a context.

    Args:
        model: Folder of the model.
        tp: Worker processes.
        options: Further options of `headrace engine`.
        environment: Variables of the engine beside this process's own.
        wait: Whether to wait until it is ready.
        port: Port to listen on; None takes a free one.
        log: File that takes what the engine writes; None lets its errors through to the terminal.

    Attributes:
        target: What `--to` and `ParameterServer.update` take.
    """

    def __init__(
        self,
        model: Path,
        tp: int = 1,
        *options: str,
        environment: dict[str, str] | None = None,
        wait: bool = True,
        port: int | None = None,
        log: Path | None = None,
    ) -> None:
        port = port or free_port()
        command = [sys.executable, "-m", "headrace", "engine", "--model", str(model), "--tp", str(tp)]
        variables = os.environ | _quiet() | (environment or {})
        super().__init__([*command, "--port", str(port), *options], port, environment=variables, log=log)
        self.target = f"torch={self.url}"
        if wait:
            self.wait_ready()

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON answer of one of the engine's pages.

        Raises:
            ConnectError: The engine does not answer.
            RemoteProtocolError: It refuses.
        """
        try:
            response = self.client.get(path)
            response.raise_for_status()
            return dict(response.json())
        except httpx.HTTPStatusError as error:
            text = f"{self.url}{path} answered {error.response.status_code}: {error.response.text[:300]}"
            raise RemoteProtocolError(text, name=path) from error
        except httpx.HTTPError as error:
            raise self._broken(f"does not answer {path} ({type(error).__name__}: {error})") from error

    def health(self) -> dict[str, Any]:
        """Return what `/health` says, also where the engine has failed."""
        return dict(self.client.get("/health").json())

    def status(self) -> dict[str, Any]:
        """Return what `/headrace/status` says."""
        return self.get("/headrace/status")

    def differences(self, checkpoint: Path) -> list[str]:
        """Return the live tensors that are not, bit for bit, what the checkpoint has, as `rank: name`.

        For weights in the checkpoint's own names and dtype. Tensors that no rank has are differences too.
        """
        return differences(fingerprints(self.url), _read(checkpoint))

    def worker_pids(self) -> list[int]:
        """Return the workers' process ids, by rank."""
        return [rank["pid"] for rank in self.status()["ranks"]]

    def kill_worker(self, rank: int) -> None:
        """SIGKILL one worker."""
        os.kill(self.worker_pids()[rank], signal.SIGKILL)


def _quiet() -> dict[str, str]:
    """Return variables of a process that computes on one thread and finds the modules that this one finds."""
    path = os.pathsep.join(path for path in sys.path if path)
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}


class Stream:
    """Requests one after another, read by a thread without end; use as a context.

    Attributes:
        arrivals_s: When each token came, on the monotonic clock.
        versions: Which version each token says it is of.
        error: How the stream ended before its time, if it did.
    """

    def __init__(self, url: str, max_tokens: int = 1500) -> None:
        self.arrivals_s: list[float] = []
        self.versions: list[int | None] = []
        self.error: str | None = None
        self._stop = threading.Event()
        self._body = {
            "prompt": "the river", "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True
        }  # fmt: skip
        self._url = url
        self._thread = threading.Thread(target=self._read, name="stream", daemon=True)

    def wait_tokens(self, count: int, deadline_s: float = 20.0) -> None:
        """Wait until `count` more tokens have come.

        Raises:
            ConnectError: They did not; says how the stream ended.
        """
        wanted, limit = len(self.arrivals_s) + count, time.monotonic() + deadline_s
        while len(self.arrivals_s) < wanted:
            if time.monotonic() > limit or not self._thread.is_alive():
                message = f"{len(self.arrivals_s)} of {wanted} tokens came, then: {self.error}"
                raise ConnectError(message, name=self._url)
            time.sleep(0.005)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(30)

    def _read(self) -> None:
        try:
            with httpx.Client(timeout=30, trust_env=False) as client:
                while not self._stop.is_set() and self.error is None:
                    self._request(client)
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _request(self, client: httpx.Client) -> None:
        with client.stream("POST", f"{self._url}/v1/completions", json=self._body) as response:
            if not response.is_success:
                self.error = f"HTTP {response.status_code}"
            for line in response.iter_lines():
                if self._stop.is_set():
                    return
                self._take(line)

    def _take(self, line: str) -> None:
        if not line.startswith("data: {"):
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.error = event["error"]["message"]
            return
        choice = event["choices"][0]
        for _ in choice["token_ids"]:
            self.arrivals_s.append(time.monotonic())
            self.versions.append(choice["weight_version"])


def fingerprints(url: str) -> list[dict[str, Any]]:
    """Return what the embedded engine at `url` holds, by rank: its live tensors, where they lie, their sums."""
    answer = httpx.get(f"{url}/headrace/fingerprints", timeout=30, trust_env=False)
    return list(answer.raise_for_status().json()["ranks"])


def differences(ranks: Iterable[Mapping[str, Any]], whole: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the live tensors that are not, bit for bit, as in `whole`, as `rank: name`.

    `whole` has the engine's own names and dtype; its tensors that no rank has are differences too.
    """
    missing, found = set(whole), []
    for rank in ranks:
        for entry in rank["tensors"]:
            missing.discard(entry["name"])
            if _sum(whole[entry["name"]], entry["boxes"], entry["dim"]) != entry["sha256"]:
                found.append(f"{rank['rank']}: {entry['name']}")
    return found + [f"nowhere: {name}" for name in sorted(missing)]


def _read(checkpoint: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        found |= load_file(file)
    return found


def _sum(whole: torch.Tensor, boxes: list[dict[str, list[int]]], dim: int) -> str:
    """Return sha256 of a shard that is made of boxes, laid side by side along `dim`."""
    parts = [
        whole[tuple(slice(o, o + n) for o, n in zip(box["offsets"], box["shape"], strict=True))] for box in boxes
    ]
    shard = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
    return hashlib.sha256(shard.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
