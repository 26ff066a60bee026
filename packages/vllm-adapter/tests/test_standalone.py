"""What must work without vLLM: the control half, and the versions that it speaks of."""

from __future__ import annotations

import subprocess
import sys

import pytest

from headrace.config import EngineTarget
from headrace.errors import BackendUnavailableError, ConnectError
from headrace.protocols import EngineControl
from headrace.registry import engine_control
from headrace_vllm.versions import SUPPORTED, check_version


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


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.29.1rc1", "0.0.0.dev7", "dev"])
def test_known_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.25.3", "0.33.0", "1.0.0"])
def test_unknown_versions_are_refused(version: str) -> None:
    with pytest.raises(BackendUnavailableError, match="installed is") as caught:
        check_version(version)
    assert SUPPORTED in str(caught.value)
