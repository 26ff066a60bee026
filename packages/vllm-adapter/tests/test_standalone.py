"""What must work without vLLM: the control half, and the versions that it speaks of."""

from __future__ import annotations

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.config import EngineTarget
from headrace.errors import BackendUnavailableError, ConfigError, ConnectError
from headrace.protocols import EngineControl, Ticket
from headrace.registry import engine_control
from headrace_vllm import VllmControl, attach
from headrace_vllm.versions import SUPPORTED, check_version

TICKET = Ticket("update", "tcp://127.0.0.1:1", "key", "token")


def config_for_headrace(**parallel: object) -> SimpleNamespace:
    """Return what a control reads of the configuration of an engine that was started for Headrace."""
    return SimpleNamespace(
        instance_id="one",
        weight_transfer_config=SimpleNamespace(backend="headrace"),
        parallel_config=SimpleNamespace(worker_extension_cls="", **parallel),
    )


def test_the_control_needs_no_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from headrace_vllm import VllmControl, attach\n"
        "VllmControl('http://127.0.0.1:9').close(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_entry_point_makes_a_control() -> None:
    control = engine_control(EngineTarget("vllm=http://127.0.0.1:9", {"x-key": "k"}, verify=False))
    assert isinstance(control, EngineControl)
    with pytest.raises(ConnectError, match="not ready"):
        control.wait_ready(0.3)
    control.close()


def test_vllm_gets_no_time_out_over_http() -> None:
    """One that passed there would leave answers of workers behind, for the next forward step to take for its own."""
    bodies: dict[str, dict[str, Any]] = {}

    class Door(BaseHTTPRequestHandler):
        """Takes tickets by `/collective_rpc` only."""

        def do_POST(self) -> None:
            bodies[self.path] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200 if self.path == "/collective_rpc" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_told: object) -> None:
            """Standard error is for failures."""

    with HTTPServer(("127.0.0.1", 0), Door) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            control = VllmControl(f"http://127.0.0.1:{server.server_port}")
            control.enrol(TICKET, 5)
            control.close()
        finally:
            server.shutdown()
            thread.join()
    assert bodies["/collective_rpc"].keys() == {"method", "kwargs"}


def test_vllm_gets_no_time_out_from_an_engine_object() -> None:
    calls: list[tuple[str, float | None]] = []
    engine = SimpleNamespace(
        vllm_config=config_for_headrace(),
        collective_rpc=lambda method, timeout=None, args=(), kwargs=None: calls.append((method, timeout)),
    )
    attach(engine).enrol(TICKET, 5)
    assert calls == [("init_weight_transfer_engine", None)]


@pytest.mark.parametrize("balancing", ["data_parallel_external_lb", "data_parallel_hybrid_lb"])
def test_an_object_that_reaches_only_some_engines_is_refused(balancing: str) -> None:
    config = config_for_headrace(**{balancing: True})
    with pytest.raises(ConfigError, match=f"{balancing}: its object reaches only some"):
        attach(SimpleNamespace(vllm_config=config))


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.29.1rc1", "0.0.0.dev7", "dev"])
def test_known_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.25.3", "0.33.0", "1.0.0"])
def test_unknown_versions_are_refused(version: str) -> None:
    with pytest.raises(BackendUnavailableError, match="installed is") as caught:
        check_version(version)
    assert SUPPORTED in str(caught.value)
