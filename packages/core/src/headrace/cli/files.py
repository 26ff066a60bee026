"""Files that options ask for beside what is printed: checked before the work, written after it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from headrace.cli.console import show_warning
from headrace.errors import ConfigError


def check_writable(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written, before anything is done; nothing is made.

    Raises:
        ConfigError: Its folder is missing, or this process may not write there.
    """
    if path is None:
        return
    folder = path.parent
    if not os.access(folder, os.X_OK) or not folder.is_dir():
        why = f"there is no folder {folder} that can be entered"
    elif path.is_dir():
        why = "it is a folder"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        why = "permission denied"
    else:
        return
    raise ConfigError(f"{option} {path} cannot be written: {why}", name=option)


def write_json(path: Path | None, data: object, indent: int | None = None) -> None:
    """Write a file that was asked for; one that cannot be written any more is a warning, as the work is done."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(data, indent=indent))
    except OSError as error:
        show_warning(f"{path} was not written: {error}")
