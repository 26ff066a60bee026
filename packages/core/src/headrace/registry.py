"""Finds engines, trainers and transports by entry points, and says why one cannot be had."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from headrace.config import EngineTarget
from headrace.errors import BackendUnavailableError, ConfigError, HeadraceError
from headrace.protocols import EngineControl

Group = Literal["headrace.engines", "headrace.trainers", "headrace.transports"]
GROUPS: tuple[Group, ...] = get_args(Group)
_WITHOUT_TRANSPORT = ("auto", "collective")
"""What `UpdateSettings.transport` may be beside the names of transports."""


@dataclass(frozen=True, slots=True)
class _Provider:
    """Who brings a name that Headrace knows of: `requirement` for pip, `distribution` to look for."""

    requirement: str
    distribution: str


_VLLM = _Provider("headrace-vllm", "headrace-vllm")
_SGLANG = _Provider("headrace-sglang", "headrace-sglang")
_TRAINERS = _Provider("headrace-trainers", "headrace-trainers")
_CORE = _Provider("headrace", "headrace")
KNOWN: Mapping[Group, Mapping[str, _Provider]] = {
    "headrace.engines": {"torch": _CORE, "vllm": _VLLM, "sglang": _SGLANG},
    "headrace.trainers": {"deepspeed": _TRAINERS, "fsdp": _TRAINERS},
    "headrace.transports": {
        "memory": _CORE,
        "tcp": _CORE,
        "mooncake": _Provider("headrace[p2p]", "mooncake-transfer-engine"),
    },
}

# Foreign code may fail in any of these ways while it is imported; anything else is not a failed import.
_IMPORT_FAILURES = (
    ArithmeticError,
    AttributeError,
    HeadraceError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def load(group: Group, name: str) -> Any:  # noqa: ANN401 - what an entry point names is known only to its group
    """Import the one object that `name` stands for in `group`; nothing else is imported unless that fails.

    Raises:
        BackendUnavailableError: No distribution offers the name, two do, or its import failed; lists what is
            installed and why the others cannot be had.
    """
    matches = _installed(group).get(name, [])
    if len(matches) == 1:
        try:
            found = matches[0].load()
        except _IMPORT_FAILURES as error:
            raise _unavailable(group, name, f"its import failed with {_reason(error)}") from error
        if lacking := _lacking(found):
            raise _unavailable(group, name, lacking)
        return found
    if matches:
        owners = ", ".join(sorted(f"{_owner(match)} ({match.value})" for match in matches))
        raise _unavailable(group, name, f"several distributions offer it: {owners}; uninstall all but one")
    raise _unavailable(group, name, _absence(group, name))


def available(group: Group) -> dict[str, str]:
    """Import everything in `group` and return, by name, `ok` or why not; known names are never left out."""
    found = _installed(group)
    return {name: _state(group, name, found.get(name, [])) for name in sorted({*found, *KNOWN[group]})}


def check_transport(name: str) -> None:
    """Refuse a transport of an update that nobody knows, so that it is told before anything is read; imports none.

    Only workers use it, but a name that was mistyped must not be told minutes later, when they are asked.

    Raises:
        ConfigError: It is none; lists those that there are.
    """
    group: Group = "headrace.transports"
    names = [*_WITHOUT_TRANSPORT, *sorted({*_installed(group), *KNOWN[group]})]
    if name not in names:
        message = (
            f"transport is {name!r}; choose one of {', '.join(names)}. One that only the engines have must be "
            "installed here too, as its name is looked up before they are asked"
        )
        raise ConfigError(message, name="transport")


def engine_control(target: str | EngineTarget) -> EngineControl:
    """Return the control of the engine that `target` names (`torch=http://127.0.0.1:8000`); dials nobody yet.

    Args:
        target: `ENGINE=URL`, the engine being a name of `headrace.engines`; or that with headers and TLS options.

    Raises:
        ConfigError: `target` is malformed, or a file that it names cannot be used.
        BackendUnavailableError: No such engine is installed, or its adapter is broken.
    """
    chosen = EngineTarget(target) if isinstance(target, str) else target
    name, url = _split_target(chosen.address)
    factory = load("headrace.engines", name)
    return cast("EngineControl", factory(url, headers=chosen.headers, verify=_tls(chosen)))


def _tls(target: EngineTarget) -> ssl.SSLContext | bool:
    """Return what httpx takes for the certificates of a target."""
    if isinstance(target.verify, bool) and target.certificate is None:
        return target.verify
    try:
        context = ssl.create_default_context(cafile=target.verify if isinstance(target.verify, str) else None)
        if target.certificate is not None:
            context.load_cert_chain(target.certificate)
    except OSError as error:
        files = ", ".join(file for file in (target.verify, target.certificate) if isinstance(file, str))
        message = f"the certificates for {target.address} cannot be used ({files}): {error}; give PEM files"
        raise ConfigError(message, name=target.address) from error
    if target.verify is False:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _split_target(target: str) -> tuple[str, str]:
    name, equals, url = target.strip().partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", name):
        raise _bad_target(target, "it has no engine name before a `=`")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _bad_target(target, f"its address is not a URL ({error})") from None
    if parts.scheme not in ("http", "https"):
        raise _bad_target(target, "its address does not begin with http:// or https://")
    if not parts.hostname or port == 0:
        raise _bad_target(target, "its address names no host and port to dial")
    return name, url.rstrip("/")


def _bad_target(target: str, reason: str) -> ConfigError:
    examples = "torch=http://127.0.0.1:8000, vllm=http://gpu7:8000 or sglang=https://gpu8:30000"
    message = f"engine target {target!r} is not usable: {reason}; write ENGINE=URL, e.g. {examples}"
    return ConfigError(message, name=target)


def _installed(group: Group) -> dict[str, list[EntryPoint]]:
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, {})[point.value] = point
    return {name: list(points.values()) for name, points in found.items()}


def _state(group: Group, name: str, points: list[EntryPoint]) -> str:
    if not points:
        return _absence(group, name)
    if len(points) > 1:
        return f"several distributions offer it: {', '.join(sorted(map(_owner, points)))}"
    try:
        return _lacking(points[0].load()) or "ok"
    except _IMPORT_FAILURES as error:
        return f"import failed: {_reason(error)}"


def _lacking(found: object) -> str:
    """Return what a provider says it lacks here: its optional `missing()`; empty where it can be used."""
    ask = getattr(found, "missing", None)
    return str(ask()) if callable(ask) else ""


def _absence(group: Group, name: str) -> str:
    provider = KNOWN[group].get(name)
    if provider is None:
        return f"no installed distribution offers it (entry point group {group})"
    try:
        present = version(provider.distribution)
    except PackageNotFoundError:
        return f"not installed; pip install '{provider.requirement}'"
    return f"{provider.distribution} {present} is installed, but offers no {name!r} in {group}"


def _unavailable(group: Group, name: str, reason: str) -> BackendUnavailableError:
    kind = group.removeprefix("headrace.")
    others = {other: state for other, state in available(group).items() if other != name}
    usable = ", ".join(other for other, state in others.items() if state == "ok") or "none"
    broken = "".join(f"; {other}: {state}" for other, state in others.items() if state != "ok")
    message = f"{kind.removesuffix('s')} {name!r} is not available: {reason}. Usable {kind}: {usable}{broken}"
    return BackendUnavailableError(message, name=name)


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown distribution"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
