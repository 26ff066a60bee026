"""Which network interfaces a host has, as the kernel lists them, and the patterns that name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from headrace.errors import ConfigError

INFINIBAND = Path("/sys/class/infiniband")
NET = Path("/sys/class/net")
_RATE = re.compile(r"([\d.]+) Gb/sec")


@dataclass(frozen=True, slots=True)
class RdmaDevice:
    """One port of an RDMA device.

    Attributes:
        name: As Mooncake and NCCL call it, `mlx5_0`.
        port: Counted from 1.
        gbit: Speed in Gbit/s; 0 where the kernel does not say.
        active: Whether the port can be used.
        numa_node: Node of the host's memory that is near; -1 where there is only one.
    """

    name: str
    port: int
    gbit: float
    active: bool
    numa_node: int


@dataclass(frozen=True, slots=True)
class TcpInterface:
    """One network interface: name, speed in Gbit/s (0 where unknown), and whether it is up."""

    name: str
    gbit: float
    active: bool


Nic = TypeVar("Nic", RdmaDevice, TcpInterface)


def rdma_devices(root: Path = INFINIBAND) -> list[RdmaDevice]:
    """Return every port of every RDMA device of this host; empty where there are none."""
    found = []
    for device in _children(root):
        node = _read(device / "device" / "numa_node")
        for port in _children(device / "ports"):
            rate = _RATE.match(_read(port / "rate"))
            active = "ACTIVE" in _read(port / "state")
            found.append(
                RdmaDevice(
                    name=device.name,
                    port=int(port.name),
                    gbit=float(rate[1]) if rate else 0.0,
                    active=active,
                    numa_node=int(node) if re.fullmatch(r"-?\d+", node) else -1,
                )
            )
    return found


def tcp_interfaces(root: Path = NET) -> list[TcpInterface]:
    """Return every network interface of this host, the loopback included."""
    found = []
    for one in _children(root):
        speed = _read(one / "speed")
        gbit = int(speed) / 1000 if re.fullmatch(r"\d+", speed) else 0.0
        found.append(TcpInterface(one.name, gbit, _read(one / "operstate") in {"up", "unknown"}))
    return found


def select(nics: Sequence[Nic], pattern: str) -> list[Nic]:
    """Return the interfaces that a pattern names, in their own order.

    Args:
        nics: What there is.
        pattern: As NCCL_IB_HCA and NCCL_SOCKET_IFNAME have it: names separated by commas, each a prefix, for RDMA with
            `:PORT`; `=` before them all asks for whole names, `^` for all others, `^=` for both; empty for all.

    Raises:
        ConfigError: The pattern is malformed, or names nothing that can be used; lists what there is.
    """
    match = re.fullmatch(r"(\^?)(=?)(.*)", pattern.strip())
    names = [name for name in (match[3] if match else "").split(",") if name]
    if match is None or any(not re.fullmatch(r"[\w.@-]+(:\d+)?", name) for name in names):
        raise ConfigError(
            f"{pattern!r} names no interfaces; write e.g. mlx5_0,mlx5_1 or ^docker", name="nics"
        )
    exclude, exact = bool(match[1]), bool(match[2])
    chosen = [nic for nic in nics if nic.active and (not names or _named(nic, names, exact=exact) != exclude)]
    if not chosen:
        there = ", ".join(f"{nic.name}{'' if nic.active else ' (down)'}" for nic in nics) or "none"
        raise ConfigError(f"{pattern!r} names no interface that can be used; there are: {there}", name="nics")
    return chosen


def _named(nic: RdmaDevice | TcpInterface, names: Iterable[str], *, exact: bool) -> bool:
    for name in names:
        bare, _, port = name.partition(":")
        right_port = not port or (isinstance(nic, RdmaDevice) and nic.port == int(port))
        if right_port and (nic.name == bare if exact else nic.name.startswith(bare)):
            return True
    return False


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(
            folder.iterdir(), key=lambda path: [int(p) if p.isdigit() else p for p in _parts(path.name)]
        )
    except OSError:
        return []


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", name) if part]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
