"""What must work without SGLang: the control half, and the versions that it speaks of."""

from __future__ import annotations

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from headrace.errors import BackendUnavailableError, ConnectError
from headrace.protocols import EngineControl
from headrace.registry import engine_control
from headrace_sglang import SglangControl
from headrace_sglang.versions import SUPPORTED


def test_the_control_needs_no_sglang() -> None:
    code = (
        "import sys; sys.modules['sglang'] = None\n"
        "from headrace_sglang import SglangControl, attach\n"
        "SglangControl('http://127.0.0.1:9').close(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_entry_point_makes_a_control() -> None:
    control = engine_control("sglang=http://127.0.0.1:9")
    assert isinstance(control, EngineControl)
    with pytest.raises(ConnectError, match="not ready"):
        control.wait_ready(0.3)
    control.close()


def test_a_server_without_the_plug_in_says_what_to_install() -> None:
    """Whatever has no route of the plug-in, here a server of the standard library."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    methods = {"do_GET": _not_found, "log_message": _quiet}
    server.RequestHandlerClass = type("NotFound", (BaseHTTPRequestHandler,), methods)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        control = SglangControl(f"http://127.0.0.1:{server.server_port}")
        for ask in (control.wait_ready, control.expected_receivers, control.served_version):
            with pytest.raises(BackendUnavailableError, match="install headrace-sglang"):
                ask(5)
        control.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _not_found(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(404)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _quiet(*_args: object) -> None:
    """Standard error is for failures."""


@pytest.mark.parametrize("version", ["0.5.23", "0.5.24.post1", "0.5.23+cpu", "0.0.0.dev7", "dev"])
def test_known_versions(version: str) -> None:
    SUPPORTED.check(version)


@pytest.mark.parametrize("version", ["0.5.22", "0.4.9", "0.6.0", "1.0.0"])
def test_unknown_versions_are_refused(version: str) -> None:
    with pytest.raises(BackendUnavailableError, match="installed is") as caught:
        SUPPORTED.check(version)
    assert "0.5.23 to 0.5.x" in str(caught.value)
