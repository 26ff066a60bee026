"""Tests that need GPUs are skipped, with the reason, where there are too few."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _enough_gpus(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("gpu")
    needed = int(marker.args[0]) if marker else 1
    found = torch.cuda.device_count()
    if found < needed:
        pytest.skip(f"needs {needed} CUDA devices, torch sees {found}")
