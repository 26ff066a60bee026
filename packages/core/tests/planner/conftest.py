"""Makes the oracle `world` importable: tests are collected one by one, without packages."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
