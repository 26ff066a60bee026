"""Engines in a Python process of their own: how a test runs one, and how one is taken through updates there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ConfigError, HeadraceError
from headrace.protocols import EngineControl
from headrace.report import UpdateReport
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


def answer(main: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be what `run_child` runs: write what `main` makes of its SPEC; the process ends, whatever an engine left."""
    try:
        told = main(json.loads(Path(sys.argv[1]).read_text()))
        Path(sys.argv[2]).write_text(json.dumps(told))
    except BaseException:  # noqa: BLE001 - in the log, which `run_child` shows where there is no result
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def states_over_updates(
    control: EngineControl, checkpoints: Sequence[str], state: Callable[[], dict[str, Any]], **choices: object
) -> list[dict[str, Any]]:
    """Return the state of an engine before any update, and after one to each checkpoint, with what came of that.

    `choices` are the updates'.
    """
    states = [state()]
    for checkpoint in checkpoints:
        with ParameterServer(checkpoint) as server:
            try:
                outcome = _outcome(server.update(control, **choices))
            except HeadraceError as error:
                outcome = {"error": str(error), "weights_state": error.weights_state}
        states.append(outcome | state())
    return states


def _outcome(report: UpdateReport) -> dict[str, Any]:
    worker = report.workers[0]
    found = {"opaque": len(worker.opaque_names), "left": list(worker.left_names), "ring": worker.ring}
    return found | {"unused": list(report.unused_names)}


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
