"""What the plug-in needs of SGLang: it is there in the version that is installed, and its absence is told."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sglang_server import environment

pytestmark = pytest.mark.timeout(180)

CODE = """
from headrace_sglang import plugin
print("before:", plugin.why_not())
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
del Scheduler._record_scheduler_state_for_paused_engine
print("optional:", plugin.why_not())
del SchedulerWeightUpdaterManager.update_weights_from_ipc
print("after:", plugin.why_not())
plugin.register()
from sglang.srt.plugins.hook_registry import HookRegistry
print("hooked:", *HookRegistry._hooks)
"""


def test_a_hook_point_that_is_missing_is_named_and_nothing_but_the_door_is_hooked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment(), capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(("be", "op", "af", "ho")))
    assert said["before"] == said["optional"] == ""
    assert "SchedulerWeightUpdaterManager.update_weights_from_ipc, which" in said["after"]
    assert "headrace-sglang needs" in said["after"]
    assert said["hooked"].split() == ["sglang.srt.entrypoints.engine.Engine._launch_subprocesses"]
