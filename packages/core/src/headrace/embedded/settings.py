"""What an embedded engine is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from headrace.config import MAX_PORT
from headrace.errors import ConfigError

LoadFormat = Literal["auto", "dummy"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """Choices of one embedded engine.

    Attributes:
        model: Folder with `config.json`, a tokenizer and (unless dummy) safetensors, which are version 0.
        tp: Tensor-parallel worker processes.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        device: `cpu`, or `cuda` with one GPU per worker.
        dtype: `auto` takes the checkpoint's.
        load_format: `dummy` starts with random weights, paused until the first update.
        served_name: Model name in the HTTP interface; the folder's name if empty.
        api_key: Where given, requests need `Authorization: Bearer KEY`.
        num_threads: CPU threads per worker.
        max_running: Requests that take part in one step; more wait.
        start_s: Longest start of the workers.
        step_s: Longest step; a worker that needs longer is given up.
    """

    model: Path
    tp: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    device: Device = "cpu"
    dtype: str = "auto"
    load_format: LoadFormat = "auto"
    served_name: str = ""
    api_key: str = ""
    num_threads: int = 1
    max_running: int = 64
    start_s: float = 600.0
    step_s: float = 300.0

    def __post_init__(self) -> None:
        for field, allowed in (("device", Device), ("load_format", LoadFormat)):
            value = getattr(self, field)
            if value not in get_args(allowed):
                raise ConfigError(
                    f"{field} is {value!r}; choose one of {', '.join(get_args(allowed))}", name=field
                )
        for field in ("tp", "num_threads", "max_running"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; the least is 1", name=field)
        if not 0 <= self.port <= MAX_PORT:
            raise ConfigError(f"port is {self.port}; give one of 0 to {MAX_PORT}", name="port")
        if not (self.model / "config.json").is_file():
            message = f"{self.model} has no config.json; give a folder in Hugging Face layout"
            raise ConfigError(message, name=str(self.model))

    @property
    def name(self) -> str:
        """Model name in the HTTP interface."""
        return self.served_name or self.model.resolve().name
