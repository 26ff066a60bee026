"""Snapshots of what processes hold, so that a test can say that nothing was left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

_MARK = "memfd:headrace"


@dataclass(frozen=True)
class Snapshot:
    """What some processes hold, counted by process id.

    Attributes:
        memfds: Open file descriptors and mappings of Headrace's segments.
        mappings: Bytes of Headrace's segments that are mapped.
        files: All open file descriptors.
        threads: Threads.
        children: Child processes that are no zombies.
        folders: Socket folders of holders, dead or alive, counted under 0.
    """

    memfds: dict[int, int]
    mappings: dict[int, int]
    files: dict[int, int]
    threads: dict[int, int]
    children: dict[int, int]
    folders: dict[int, int]

    def grown(self, later: Snapshot, *, ignoring: tuple[str, ...] = ()) -> list[str]:
        """Return what is more in `later`, one sentence each; processes that have ended hold nothing."""
        found = []
        for field in fields(self):
            if field.name in ignoring:
                continue
            before, after = getattr(self, field.name), getattr(later, field.name)
            found += [
                f"{field.name} of process {pid}: {before.get(pid, 0)} before, {count} now"
                for pid, count in after.items()
                if count > before.get(pid, 0)
            ]
        return found


def snapshot(pids: Iterable[int] | None = None, *, socket_dir: Path | None = None) -> Snapshot:
    """Count what processes hold now.

    Args:
        pids: Processes beside this one; None takes all descendants of this one.
        socket_dir: The host's socket folder, if holders' folders are to be counted.
    """
    chosen = {os.getpid(), *(descendants() if pids is None else pids)}
    alive = [pid for pid in sorted(chosen) if _is_alive(pid)]
    return Snapshot(
        memfds={pid: sum(_MARK in one for one in _targets(pid)) + len(_maps(pid)) for pid in alive},
        mappings={pid: _mapped_bytes(pid) for pid in alive},
        files={pid: len(_targets(pid)) for pid in alive},
        threads={pid: len(_entries(Path(f"/proc/{pid}/task"))) for pid in alive},
        children={pid: len(children(pid)) for pid in alive},
        folders={0: len(list(socket_dir.glob("*holder-*"))) if socket_dir else 0},
    )


def left_over(
    before: Snapshot,
    pids: Iterable[int] | None = None,
    *,
    socket_dir: Path | None = None,
    ignoring: tuple[str, ...] = (),
    within: float = 10.0,
) -> list[str]:
    """Return what is more than `before` and has not gone within some seconds, one sentence each.

    The system ends a thread, a mapping or a process a moment after whoever joined it goes on; only what stays leaks.

    Args:
        before: What was held.
        pids: Processes beside this one; None takes all descendants of this one.
        socket_dir: The host's socket folder, if holders' folders are to be counted.
        ignoring: Fields of `Snapshot` that may grow.
        within: Seconds that leftovers are given to go.
    """
    deadline = time.monotonic() + within
    while found := before.grown(snapshot(pids, socket_dir=socket_dir), ignoring=ignoring):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return found


def children(pid: int) -> list[int]:
    """Return the living child processes of `pid`, without the helper that multiprocessing keeps."""
    found = [child for child, (state, parent) in _processes().items() if parent == pid and state not in "ZX"]
    return [child for child in found if not _is_tracker(child)]


def descendants(pid: int | None = None) -> list[int]:
    """Return all living processes below `pid` (this process if None)."""
    found = children(os.getpid() if pid is None else pid)
    return found + [deeper for child in found for deeper in descendants(child)]


def _is_tracker(pid: int) -> bool:
    """Return whether it is multiprocessing's resource tracker, which stays for a process's whole life."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _processes() -> dict[int, tuple[str, int]]:
    """Return state and parent of every process."""
    return {int(entry.name): found for entry in _entries(Path("/proc")) if (found := _state(entry.name))}


def _state(pid: str | int) -> tuple[str, int] | None:
    if not str(pid).isdigit():
        return None
    try:
        columns = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return columns[0], int(columns[1])


def _is_alive(pid: int) -> bool:
    found = _state(pid)
    return found is not None and found[0] not in "ZX"


def _targets(pid: int) -> list[str]:
    found = []
    for entry in _entries(Path(f"/proc/{pid}/fd")):
        with suppress(OSError):
            found.append(str(entry.readlink()))
    return found


def _maps(pid: int) -> list[str]:
    """Return the lines of segments in a process's table of mappings."""
    with suppress(OSError):
        return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if _MARK in line]
    return []


def _mapped_bytes(pid: int) -> int:
    total = 0
    for line in _maps(pid):
        begin, end = line.split()[0].split("-")
        total += int(end, 16) - int(begin, 16)
    return total


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
