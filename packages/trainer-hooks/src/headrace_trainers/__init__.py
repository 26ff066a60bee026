"""Headrace for trainers: after an optimizer step, engines that serve get the new weights; nothing is gathered.

`headrace_trainers.fsdp`, `.deepspeed`, `.plain`, `.transformers`, `.accelerate` and `.lightning` attach a hook, each in
its framework's own way; none is imported unless it is asked for.
"""

from headrace_trainers.hook import Hook
from headrace_trainers.settings import HOOK_UPDATE, HookSettings, StepReport

__all__ = ["HOOK_UPDATE", "Hook", "HookSettings", "StepReport"]
