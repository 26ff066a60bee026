"""Engines in a Python process of their own: how a test runs one, and what one in an event loop does there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ConfigError
from headrace.protocols import EngineControl
from headrace.server.parameter_server import ParameterServer


def run_child(
    script: Path, spec: Mapping[str, Any], folder: Path, environment: Mapping[str, str], timeout_s: float = 170.0
) -> dict[str, Any]:
    """Run `python SCRIPT SPEC.json OUT.json` and return what it wrote, whatever its exit code; it finds this module."""
    told, out = folder / "spec.json", folder / "out.json"
    told.write_text(json.dumps(spec))
    path = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(Path(__file__).parent))))
    log = folder / "child.log"
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, str(script), str(told), str(out)], env={**environment, "PYTHONPATH": path},
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            said = log.read_text(errors="replace")[-6000:]
            raise AssertionError(f"{script.name} did not end within {timeout_s:.0f} s\n{said}") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(20)
    assert out.exists(), log.read_text(errors="replace")[-6000:]
    made: dict[str, Any] = json.loads(out.read_text())
    return made


async def update_while_answering(
    control: EngineControl,
    checkpoint: str,
    ask: Callable[[int], Awaitable[dict[str, Any]]],
    begun: asyncio.Event,
    **choices: object,
) -> dict[str, Any]:
    """Ask again and again while an update is made; one request is in flight over it, once `begun` is set.

    `choices` are the update's.
    """
    done = asyncio.Event()

    async def keep_asking() -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        while not done.is_set():
            answers.append(await ask(len(answers)))
        return answers

    requests = asyncio.create_task(keep_asking())
    await begun.wait()
    with ParameterServer(checkpoint) as server:
        with pytest.raises(ConfigError, match="to_thread"):
            server.update([control, control])
        report = await asyncio.to_thread(server.update, control, **choices)
    done.set()
    answers = await requests
    served = await asyncio.to_thread(control.served_version, 10.0)
    barrier = report.engines[0].barrier
    return {"answers": answers, "version": report.version, "served": served, "barrier": barrier}
