"""The demo's engine: `headrace engine` in a process of its own, as a user would start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from headrace.errors import ConnectError, RemoteProtocolError

_POLL_S = 0.2
_LEAVE_S = 20.0
_LOG_LINES = 15


class EngineProcess:
    """Starts an engine on a free port, asks it over HTTP, and ends it with all its workers.

    Args:
        model: Folder of the model it serves first.
        tp: Worker processes.
        device: `cpu` or `cuda`.
        log: File that takes what the engine writes.
    """

    def __init__(self, model: Path, tp: int, device: str, log: Path) -> None:
        self._log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._client = httpx.Client(base_url=self.url, trust_env=False, timeout=60.0)
        command = [sys.executable, "-m", "headrace", "engine", "--model", str(model), "--tp", str(tp)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--device", device, "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )

    @property
    def target(self) -> str:
        """The engine as `--to` names it."""
        return f"torch={self.url}"

    def wait_ready(self, deadline_s: float) -> None:
        """Wait until the engine answers.

        Raises:
            ConnectError: It left or did not answer in time; holds the end of its log.
        """
        end = time.monotonic() + deadline_s
        while not self._answers():
            if self._process.poll() is not None:
                raise self._broken(f"left with exit code {self._process.returncode}")
            if time.monotonic() > end:
                raise self._broken(f"was not ready after {deadline_s:g} s")
            time.sleep(_POLL_S)

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON answer of one of the engine's pages.

        Raises:
            ConnectError: The engine does not answer.
            RemoteProtocolError: It refuses.
        """
        try:
            response = self._client.get(path)
            response.raise_for_status()
            answer: dict[str, Any] = response.json()
        except httpx.HTTPStatusError as error:
            text = f"{self.url}{path} answered {error.response.status_code}: {error.response.text[:300]}"
            raise RemoteProtocolError(text, name=path) from error
        except httpx.HTTPError as error:
            raise self._broken(f"does not answer {path} ({type(error).__name__}: {error})") from error
        return answer

    def close(self) -> None:
        """End the engine and wait until it is gone; idempotent."""
        self._client.close()
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answers(self) -> bool:
        try:
            return self._client.get("/health").is_success
        except httpx.HTTPError:
            return False

    def _broken(self, what: str) -> ConnectError:
        tail = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return ConnectError(
            "\n".join([f"the demo's engine {what}; its log ends with:", *tail]), name=self.url
        )


def _environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
