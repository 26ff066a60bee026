"""Asks an engine on this host for its version, and which live tensors are not those of a checkpoint; prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx
from safetensors.torch import load_file

from headrace.testing.engine_process import differences, fingerprints

url, folder = sys.argv[1], Path(sys.argv[2])
version = httpx.get(f"{url}/headrace/status", timeout=30, trust_env=False).json()["weight_version"]
whole = load_file(folder / "model.safetensors")
sys.stdout.write(json.dumps({"version": version, "differences": differences(fingerprints(url), whole)}))
