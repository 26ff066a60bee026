"""Frozen settings, and the one place that reads the `HEADRACE_*` variables."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self, get_args

import msgspec

from headrace.errors import ConfigError
from headrace.types import BarrierName, CacheMode, RouteName, VerifyMode

MIB = 1 << 20
GIB = 1 << 30
BUCKET_BYTES = 64 * MIB
MAX_PORT = 65535


def check_seconds(given: float, name: str) -> None:
    """Refuse a deadline that is none.

    Args:
        given: In seconds.
        name: The option or field that it comes from, for the error.

    Raises:
        ConfigError: It is no number, negative, or without end.
    """
    if not 0 <= given < float("inf"):
        raise ConfigError(f"{name} is {given}; give seconds, 0 or more", name=name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadlines:
    """How long each wait may take, in seconds."""

    ready_s: float = 600.0
    enrol_s: float = 60.0
    read_s: float = 1800.0
    describe_s: float = 300.0
    stage_s: float = 600.0
    pause_s: float = 60.0
    commit_s: float = 120.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            check_seconds(getattr(self, limit.name), limit.name)


@dataclass(frozen=True, slots=True)
class EngineTarget:
    """An engine to update, and how its HTTP interface is reached.

    Attributes:
        address: `ENGINE=URL`, such as `vllm=https://gpu7:8000`.
        headers: Sent with every request, such as an API key.
        verify: Whether TLS certificates are checked, or the file of the authority to check them against.
        certificate: PEM file with this client's certificate and key, where the engine's side asks for one.
    """

    address: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    verify: bool | str = True
    certificate: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateSettings:
    """Choices of one update.

    Attributes:
        route: `auto` lets the planner choose per receiver.
        transport: `auto`, or the name of one transport that must be used (`memory`, `tcp`, ...).
        cache: `recompute` drops KV of the old weights, `keep` keeps it.
        barrier: What keeps forward steps out of the commit. `pause`: the engine's own pause. `hold`: its workers stand
            still inside one call, which is shorter and needs that caches are kept and all bytes are near. `auto` holds
            where that can be done.
        verify: `digest` compares sums of every destination box, `full` compares bytes, `none` nothing.
        version: Version to serve afterwards; None takes the greatest served plus one.
        strict: Refuse source names that nothing uses.
        rolling: Pause engines one after another, so that a fleet never stops as a whole; a failure ends it there.
        budget_bytes: Most staging memory per receiver; None asks the engine what is free.
        bucket_bytes: Wished size of one bucket; at its default, rings in GPU memory take larger ones where they fit.
        deadlines: Limits of every wait.
    """

    route: RouteName = "auto"
    transport: str = "auto"
    cache: CacheMode = "recompute"
    barrier: BarrierName = "auto"
    verify: VerifyMode = "digest"
    version: int | None = None
    strict: bool = False
    rolling: bool = False
    budget_bytes: int | None = None
    bucket_bytes: int = BUCKET_BYTES
    deadlines: Deadlines = Deadlines()

    def __post_init__(self) -> None:
        choices = {"route": RouteName, "cache": CacheMode, "barrier": BarrierName, "verify": VerifyMode}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                message = f"{name} is {value!r}; choose one of {', '.join(get_args(allowed))}"
                raise ConfigError(message, name=name)
        if self.barrier == "hold" and self.cache != "keep":
            message = "a hold drops no caches; give cache=keep with it, or barrier=pause"
            raise ConfigError(message, name="barrier")
        if self.version is not None and self.version < 0:
            raise ConfigError(f"version is {self.version}; it must not be negative", name="version")
        if self.bucket_bytes < 4096:
            raise ConfigError(f"bucket_bytes is {self.bucket_bytes}; the least is 4096", name="bucket_bytes")
        if self.budget_bytes is not None and self.budget_bytes < 0:
            raise ConfigError(f"budget_bytes is {self.budget_bytes}; it must not be negative", name="budget_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSettings:
    """What this host allows; from the environment, see `from_env`.

    Attributes:
        socket_dir: Folder for unix sockets that pass file descriptors, of mode 0700, or 0711 where other users are
            permitted. Give engines in another container the same folder.
        permitted_uids: Users whose processes may open this host's segments.
        is_default_dir: Whether nobody chose `socket_dir`, so that its mode may be changed.
        bind_host: Address that control and data sockets listen on.
        bind_port: Port of the first control socket that is made with these settings; 0 takes any.
        advertise_host: Address that peers are told to dial; empty where `bind_host` is every one and none was named.
        mooncake: Whether holders serve their segments through Mooncake as well, which authenticates nobody.
        mooncake_nics: RDMA devices that Mooncake uses; empty for TCP.
        mooncake_cpus: CPUs of Mooncake's helper processes; None leaves them where the system puts them.
        staging_bytes: GPU memory that an adapter takes for staging before its engine sizes the KV cache.
        recipe_cache: Folder that keeps proven recipes over restarts of an engine; None keeps them in memory.
    """

    socket_dir: Path
    permitted_uids: frozenset[int]
    bind_host: str = "127.0.0.1"
    advertise_host: str = "127.0.0.1"
    bind_port: int = 0
    mooncake: bool = False
    mooncake_nics: tuple[str, ...] = ()
    mooncake_cpus: frozenset[int] | None = None
    recipe_cache: Path | None = None
    staging_bytes: int = 0
    is_default_dir: bool = False

    def plain(self) -> dict[str, object]:
        """Return it as JSON carries it, for a process of this host that takes the same."""
        made: dict[str, object] = msgspec.to_builtins(self, enc_hook=str)
        return made

    @classmethod
    def of_plain(cls, given: dict[str, object]) -> Self:
        """Return what `plain` was made of."""
        return msgspec.convert(given, cls, dec_hook=lambda kind, value: kind(value))

    def require_advertised(self) -> str:
        """Return `advertise_host`, for who listens.

        Raises:
            ConfigError: There is none.
        """
        if not self.advertise_host:
            message = (
                f"this host listens on {self.bind_host}, which is every address; name the one that others dial with "
                "HEADRACE_ADVERTISE (`headrace hold`: --advertise), or listen on it alone; `hostname -I` lists them"
            )
            raise ConfigError(message, name="HEADRACE_ADVERTISE")
        return self.advertise_host


_CPUS = "HEADRACE_MOONCAKE_CPUS"
ALL_ADDRESSES = frozenset({"0.0.0.0", "::", "*"})  # noqa: S104 - compared with, not bound


def cpu_set(text: str, name: str) -> frozenset[int]:
    """Return the CPUs of a list as `taskset -c` takes it, such as `0-3,8`.

    Args:
        text: The list.
        name: The option or variable that it comes from, for the error.

    Raises:
        ConfigError: It is malformed, or this process may use none of them.
    """
    try:
        ranges = [[int(end) for end in part.split("-", 1)] for part in text.split(",")]
    except ValueError:
        message = f"{name} is {text!r}; write CPUs as numbers and ranges, such as 0-3,8"
        raise ConfigError(message, name=name) from None
    cpus = frozenset(cpu for ends in ranges for cpu in range(ends[0], ends[-1] + 1))
    permitted = os.sched_getaffinity(0)
    if not cpus & permitted:
        message = f"{name} is {text!r}, but this process may only use the CPUs {sorted(permitted)}"
        raise ConfigError(message, name=name)
    return cpus


def size_bytes(given: float | str, unit_bytes: int, name: str) -> int:
    """Return a size in `MIB` or `GIB` as bytes.

    Args:
        given: How many.
        unit_bytes: Bytes of one.
        name: The option or variable that it comes from, for the error.

    Raises:
        ConfigError: It is no number, negative, or without end.
    """
    try:
        wished = float(given) * unit_bytes
    except ValueError:
        wished = -1.0
    if not 0 <= wished < float("inf"):
        unit = {MIB: "MiB", GIB: "GiB"}[unit_bytes]
        raise ConfigError(f"{name} is {given}; give {unit} as a number, such as 8.5", name=name)
    return int(wished)


def bracketed(host: str) -> str:
    """Return an address as it stands before a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def advertised(bind: str, environ: Mapping[str, str] | None = None) -> str:
    """Return what peers are told to dial: `HEADRACE_ADVERTISE`, else `bind`; empty where that is every address."""
    env = os.environ if environ is None else environ
    return env.get("HEADRACE_ADVERTISE") or ("" if bind in ALL_ADDRESSES else bind)


def host_settings(environ: Mapping[str, str] | None = None) -> HostSettings:
    """Read the `HEADRACE_*` variables, which only this module does.

    `HEADRACE_SOCKET_DIR`, `HEADRACE_PERMITTED_UIDS`, `HEADRACE_BIND`, `HEADRACE_ADVERTISE`, `HEADRACE_RECIPE_CACHE`,
    `HEADRACE_MOONCAKE_CPUS`, `HEADRACE_STAGING_GIB`.

    Raises:
        ConfigError: A value makes no sense; names the variable.
    """
    env = os.environ if environ is None else environ
    uids = env.get("HEADRACE_PERMITTED_UIDS", "")
    try:
        permitted = frozenset(int(uid) for uid in uids.split(",") if uid.strip()) | {os.getuid()}
    except ValueError:
        message = f"HEADRACE_PERMITTED_UIDS is {uids!r}; give user ids separated by commas"
        raise ConfigError(message, name="HEADRACE_PERMITTED_UIDS") from None
    bind = env.get("HEADRACE_BIND", "127.0.0.1")
    default = Path(env.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"headrace-{os.getuid()}"
    return HostSettings(
        socket_dir=Path(env.get("HEADRACE_SOCKET_DIR") or default),
        permitted_uids=permitted,
        is_default_dir=not env.get("HEADRACE_SOCKET_DIR"),
        bind_host=bind,
        mooncake_cpus=cpu_set(cpus, _CPUS) if (cpus := env.get(_CPUS)) else None,
        staging_bytes=size_bytes(env.get("HEADRACE_STAGING_GIB", "0"), GIB, "HEADRACE_STAGING_GIB"),
        recipe_cache=Path(cache) if (cache := env.get("HEADRACE_RECIPE_CACHE")) else None,
        advertise_host=advertised(bind, env),
    )
