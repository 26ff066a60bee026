"""What holds for all tests of the repository."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

# A run in the background of a shell ignores SIGINT, and would hand that down to every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is; pytest-timeout bounds the whole.
if find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    settings.register_profile("headrace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("headrace")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu(n)` where there are too few, before any of their fixtures is made."""
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    import torch  # noqa: PLC0415 - only tests of GPUs need it

    needed, found = int(marker.args[0]), torch.cuda.device_count()
    if found < needed:
        pytest.skip(f"needs {needed} CUDA devices, torch sees {found}")


@pytest.fixture
def socket_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set a socket folder of the test's own for this process and all that it starts."""
    folder = tmp_path_factory.mktemp("s")
    folder.chmod(0o700)
    monkeypatch.setenv("HEADRACE_SOCKET_DIR", str(folder))
    return folder
