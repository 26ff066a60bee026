"""How much host memory may still be taken: the machine's, within the limit of every control group above."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from headrace.errors import CapacityError

GIB = 1 << 30


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes that can be allocated without swapping or being killed; None where nothing tells.

    The least of `MemAvailable` and what each cgroup (v2 and v1) leaves, page cache counted as free.

    Args:
        root: Where `proc` and `sys` are mounted.
    """
    found = [room for room in (_machine_room(root), *_cgroup_rooms(root)) if room is not None]
    return min(found, default=None)


def require_memory(num_bytes: int, what: str, available: int | None = None) -> None:
    """Check that `num_bytes` fit.

    Raises:
        CapacityError: They do not; names what is needed, what there is, and the way out.
    """
    room = available_memory_bytes() if available is None else available
    if room is None or num_bytes <= room:
        return
    raise CapacityError(
        f"{what} needs {num_bytes / GIB:.2f} GiB of host memory, {max(room, 0) / GIB:.2f} GiB are available; "
        "release an older version, split the weights over more holders, or raise the memory limit",
        name=what,
    )


def _machine_room(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _cgroup_rooms(root: Path) -> Iterator[int | None]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            yield from _rooms(root / "sys/fs/cgroup", path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            yield from _rooms(
                root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes"
            )


def _rooms(mount: Path, path: str, limit: str, usage: str) -> Iterator[int | None]:
    """Walk from this process's group up to the mount: inside a container the inner path may not exist."""
    folder = mount / path.strip("/")
    for group in (folder, *folder.parents):
        yield _group_room(group, limit, usage)
        if group == mount:
            return


def _group_room(group: Path, limit: str, usage: str) -> int | None:
    allowed, used = _text(group / limit).strip(), _text(group / usage).strip()
    if not allowed.isdigit() or not used.isdigit():
        return None
    return int(allowed) - int(used) + _reclaimable(group)


def _reclaimable(group: Path) -> int:
    stat = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
