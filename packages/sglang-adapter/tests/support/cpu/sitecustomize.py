"""Lets SGLang start on a CPU: its own stand-in for triton (made for macOS), and an operator that torchvision wants.

Python imports this by itself where the folder is on PYTHONPATH; it acts only with `HEADRACE_SGLANG_ON_CPU=1`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any


class _Darwin:
    """`sys` on a machine that SGLang has stand-ins for."""

    platform = "darwin"

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


def _stand_in_for_triton() -> None:
    path = Path(sysconfig.get_paths()["purelib"]) / "sglang" / "_platform_stubs.py"
    if not path.exists():
        return
    import torch

    spec = importlib.util.spec_from_file_location("_sgl_platform_stubs", path)
    stubs: Any = importlib.util.module_from_spec(spec)
    sys.modules["_sgl_platform_stubs"] = stubs
    spec.loader.exec_module(stubs)
    stubs.sys = _Darwin()
    stubs.platform = types.SimpleNamespace(machine=lambda: "arm64")
    stubs._patch_non_blocking = lambda: None
    real, torch.backends.mps.is_available = torch.backends.mps.is_available, lambda: True
    try:
        stubs.install_platform_stubs()
    finally:
        torch.backends.mps.is_available = real


if os.environ.get("HEADRACE_SGLANG_ON_CPU") == "1" and importlib.util.find_spec("sglang") is not None:
    if importlib.util.find_spec("triton") is None:
        _stand_in_for_triton()
    import torchvision_operators  # noqa: F401 - declared by the import
