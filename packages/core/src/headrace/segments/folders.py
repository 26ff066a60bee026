"""The folder of a holder's socket: private, locked for the owner's life, swept after its death."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

from headrace.config import HostSettings
from headrace.errors import ConfigError

MAX_PATH_BYTES = 107
_LOCK, _SOCKET = "lock", "socket"
_UNFINISHED_S = 60.0


class HolderFolder:
    """One holder's folder, `holder-PID-RANDOM` inside the socket folder of the host.

    The lock on its lock file is what says that the owner lives: the kernel drops it at any death, and it
    holds across containers, where process ids do not.

    Raises:
        ConfigError: The socket folder is unsafe, cannot be written, or its path is too long.
    """

    def __init__(self, settings: HostSettings) -> None:
        base = settings.socket_dir
        self.path = base / f"holder-{os.getpid()}-{secrets.token_hex(4)}"
        self.socket_path = self.path / _SOCKET
        _check_length(self.socket_path)
        # Other users must be able to reach the socket where they are permitted; SO_PEERCRED then decides.
        self.mode = 0o700 if settings.permitted_uids <= {os.getuid()} else 0o711
        _make_base(base, self.mode, settings)
        sweep(base)
        self._lock = self._claim(base)

    def _claim(self, base: Path) -> int:
        """Lock before the name appears: a sweep never sees a folder whose owner has not locked it yet."""
        hidden = base / f".new-{self.path.name}"
        try:
            hidden.mkdir(mode=0o700)
            lock = os.open(hidden / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(base, str(error)) from error
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.chmod(self.mode)
        hidden.rename(self.path)
        return lock

    def remove(self) -> None:
        """Remove the folder and give up the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(base: Path) -> int:
    """Remove folders whose owner is dead and return how many; others' folders are left to their users."""
    removed = 0
    for folder in base.glob("holder-*"):
        removed += not folder.is_symlink() and folder.is_dir() and _remove_if_dead(folder)
    for folder in base.glob(".new-holder-*"):
        with suppress(OSError):
            if time.time() - folder.lstat().st_mtime > _UNFINISHED_S:
                removed += _remove_if_dead(folder)
    return removed


def _remove_if_dead(folder: Path) -> bool:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        lock = -1
    except OSError:
        return False
    try:
        if lock >= 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    shutil.rmtree(folder, ignore_errors=True)
    if lock >= 0:
        os.close(lock)
    return not folder.exists()


def _check_length(path: Path) -> None:
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        raise ConfigError(
            f"socket path {path} has {size} bytes, a unix socket allows {MAX_PATH_BYTES}; "
            "set HEADRACE_SOCKET_DIR to a shorter folder",
            name="HEADRACE_SOCKET_DIR",
        )


def _make_base(base: Path, mode: int, settings: HostSettings) -> None:
    try:
        base.mkdir(mode=mode, parents=True)
        base.chmod(mode)
    except FileExistsError:
        _check_base(base, settings)
        if mode & stat.S_IXOTH:
            _open_base(base, mode, settings)
    except OSError as error:
        raise _unusable(base, str(error)) from error


def _check_base(base: Path, settings: HostSettings) -> None:
    status = base.lstat()
    if stat.S_ISLNK(status.st_mode):
        status = base.stat() if status.st_uid in {0, os.getuid()} else status
    if not stat.S_ISDIR(status.st_mode):
        raise _unusable(base, "it is not a folder")
    if status.st_uid not in {0, os.getuid(), *settings.permitted_uids}:
        raise _unusable(base, f"it belongs to user {status.st_uid}")
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise _unusable(base, "everybody may write to it and it is not sticky")


def _open_base(base: Path, mode: int, settings: HostSettings) -> None:
    """Let permitted users pass a folder that was made when there were none; one that the user chose is the user's."""
    status = base.stat()
    if status.st_mode & (stat.S_IXGRP | stat.S_IXOTH):
        return
    if not settings.is_default_dir or status.st_uid != os.getuid():
        why = "users of HEADRACE_PERMITTED_UIDS cannot pass it; give it mode 0711"
        raise _unusable(base, why)
    base.chmod(mode)


def _unusable(base: Path, why: str) -> ConfigError:
    message = f"socket folder {base} cannot be used: {why}; set HEADRACE_SOCKET_DIR to a folder of your own"
    return ConfigError(message, name="HEADRACE_SOCKET_DIR")
