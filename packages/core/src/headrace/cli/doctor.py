"""`headrace doctor`: what this machine can do for Headrace, and why not the rest."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

from headrace.cli.console import format_bytes, print_json, stdout
from headrace.errors import ConfigError

State = Literal["ok", "limited", "missing"]
COLOURS: dict[State, str] = {"ok": "green", "limited": "yellow", "missing": "red"}
SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
DIRECT, BROADCAST, P2P, TCP = "direct", "broadcast", "p2p", "direct over tcp"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: `limited` works with a restriction that `detail` names, `missing` does not work."""

    area: str
    name: str
    state: State
    detail: str


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON: a list `checks`.")] = False,
) -> None:
    """Tell what this machine can do for Headrace: memory, devices, routes, engines, and why not the rest."""
    checks = examine()
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("area", "what", "state"):
        table.add_column(heading, no_wrap=True)
    table.add_column("detail", overflow="fold")
    area = ""
    for check in checks:
        state = f"[{COLOURS[check.state]}]{check.state}[/]"
        table.add_row("" if check.area == area else check.area, check.name, state, escape(check.detail))
        area = check.area
    stdout().print(table)


def examine() -> list[Check]:
    """Make every check; takes a second or two for torch's import; leaves only the socket folder."""
    host = [_python(), *_memory(), _sealed_memory(), *_huge_pages(), _socket_dir(), _locked_memory()]
    devices, collectives = list(_devices()), list(_collectives())
    plugins = list(_plugins())
    return [*host, *devices, *collectives, *_routes([*host, *devices, *collectives, *plugins]), *plugins]


def _python() -> Check:
    version = platform.python_version_tuple()
    usable = (3, 11) <= (int(version[0]), int(version[1])) < (3, 14)
    detail = f"{platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    detail += "" if usable else "; supported: 3.11 to 3.13"
    return Check("host", "python", "ok" if usable else "limited", detail)


def _memory() -> Iterator[Check]:
    room = _available_memory_bytes()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = len(os.sched_getaffinity(0))
    yield Check("host", "processors", "ok", f"{allowed} of {os.cpu_count()} may be used by this process")
    if room is None:
        yield Check("host", "memory", "limited", f"{format_bytes(total)} in all; how much is free is unknown")
    else:
        detail = f"{format_bytes(room)} available of {format_bytes(total)}, limits of control groups included"
        yield Check("host", "memory", "ok", detail)


def _available_memory_bytes() -> int | None:
    try:
        from headrace.segments.capacity import available_memory_bytes
    except (ImportError, OSError):  # torch is broken; that finding is made under `devices`
        return None
    return available_memory_bytes()


def _sealed_memory() -> Check:
    """Try what host segments are made of: an anonymous file whose size is sealed."""
    try:
        fd = os.memfd_create("headrace-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        detail = f"memfd_create failed: {error.strerror}; an old kernel, or a sandbox that forbids it"
        return Check("host", "shared memory", "missing", detail)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        return Check("host", "shared memory", "missing", f"a memfd cannot be sealed: {error.strerror}")
    finally:
        os.close(fd)
    return Check("host", "shared memory", "ok", "memfd with seals; no limit of /dev/shm applies")


def _huge_pages() -> Iterator[Check]:
    """Try to make the pages of a segment huge."""
    try:
        from headrace.errors import CapacityError
        from headrace.mapping import HUGE_PAGE
        from headrace.segments import HostSegment
        from headrace.segments.pages import has_huge_pages, make_pages
    except (ImportError, OSError):  # torch is broken; that finding is made under `devices`
        return
    try:
        with HostSegment(HUGE_PAGE, "headrace-doctor") as segment:
            make_pages(segment.tensor)
            huge = has_huge_pages(segment.tensor)
    except (CapacityError, OSError) as error:
        yield Check("host", "huge pages", "missing", str(error))
        return
    if huge:
        yield Check("host", "huge pages", "ok", "segments are made of pages of 2 MiB")
        return
    detail = "segments are made of 4 KiB pages, which takes longer; as root: echo advise > " + SHMEM_ENABLED
    yield Check("host", "huge pages", "limited", detail)


def _socket_dir() -> Check:
    """Make and remove a holder's folder, as every holder does at its start."""
    try:
        from headrace.config import host_settings
        from headrace.segments.folders import HolderFolder

        settings = host_settings()
        HolderFolder(settings).remove()
    except (ConfigError, ImportError, OSError) as error:
        return Check("host", "socket folder", "missing", str(error))
    uids = ", ".join(map(str, sorted(settings.permitted_uids)))
    mode = stat.S_IMODE(settings.socket_dir.stat().st_mode)
    detail = f"{settings.socket_dir}, mode {mode:04o}, open to user ids {uids}"
    return Check("host", "socket folder", "ok", detail)


def _locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("host", "locked memory", "ok", "unlimited")
    detail = f"{format_bytes(soft)} (ulimit -l); RDMA registers host memory within it, CUDA does not"
    return Check("host", "locked memory", "limited", detail)


def _devices() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("devices", "torch", "missing", f"{type(error).__name__}: {error}")
        return
    yield Check("devices", "torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Check("devices", "cuda", "missing", f"torch sees no device ({built})")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Check("devices", f"cuda:{index}", "ok", f"{found.name}, {format_bytes(found.total_memory)}")


def _collectives() -> Iterator[Check]:
    try:
        from torch import distributed
    except (ImportError, OSError) as error:
        yield Check("collectives", "torch.distributed", "missing", f"{type(error).__name__}: {error}")
        return
    if not distributed.is_available():
        yield Check("collectives", "torch.distributed", "missing", "this build of torch has none")
        return
    backends = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    for name, present in backends.items():
        detail = "" if present else "this build of torch has none"
        yield Check("collectives", name, "ok" if present else "missing", detail)


def _plugins() -> Iterator[Check]:
    from headrace.registry import GROUPS, available

    for group in GROUPS:
        for name, state in available(group).items():
            area = group.removeprefix("headrace.")
            yield Check(area, name, "ok", "") if state == "ok" else Check(area, name, "missing", state)


def _routes(checks: list[Check]) -> Iterator[Check]:
    found = {(check.area, check.name): check for check in checks}
    wants = {
        DIRECT: [("host", "shared memory"), ("host", "socket folder"), ("transports", "memory")],
        TCP: [("transports", "tcp")],
        P2P: [("transports", "mooncake")],
    }
    broadcast = ("collectives", "nccl") if _is_ok(found, ("devices", "cuda:0")) else ("collectives", "gloo")
    wants[BROADCAST] = [*wants[DIRECT], broadcast]
    for route in (DIRECT, BROADCAST, P2P, TCP):
        missing = [key for key in wants[route] if not _is_ok(found, key)]
        reasons = "; ".join(f"{key[1]}: {found[key].detail}" for key in missing if key in found)
        yield Check("routes", route, "missing" if missing else "ok", reasons)


def _is_ok(found: dict[tuple[str, str], Check], key: tuple[str, str]) -> bool:
    return key in found and found[key].state != "missing"
