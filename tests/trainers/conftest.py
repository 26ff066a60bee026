"""Where the helpers are: the trainers of the hooks' own tests, and what an engine must answer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
for folder in ("packages/trainer-hooks/tests/support", "tests/engines/support"):
    sys.path.insert(0, str(ROOT / folder))


@pytest.fixture(scope="session", autouse=True)
def socket_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set the socket folder for this process and all that it starts."""
    folder = Path(tmp_path_factory.mktemp("s", numbered=True))
    folder.chmod(0o700)
    os.environ["HEADRACE_SOCKET_DIR"] = str(folder)
    return folder
