"""Names of wrapped modules in checkpoint naming."""

from __future__ import annotations

import re

_INNER = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module)\.")


def clean_name(name: str) -> str:
    """Return a parameter's name without what DDP, FSDP1, DeepSpeed, compilation and checkpointing put into it."""
    name = _INNER.sub("", name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
