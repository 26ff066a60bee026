"""Hosts as namespaces of this machine: each has its own network, mounts and runtime directory, on one switch."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

START_S = 20.0
_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")


class Host:
    """One host: a process that sleeps in namespaces of its own.

    Attributes:
        address: Its address on the switch.
        prefix: Command line that runs what follows on this host.
        environment: Variables that its processes need.
    """

    def __init__(self, runtime: Path) -> None:
        command = ["unshare", "--net", "--mount", "--propagation", "private", "sleep", "infinity"]
        self._process = subprocess.Popen(command)
        self.pid, self.address = self._process.pid, ""
        self.prefix = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--"]
        self.environment = {"HEADRACE_SOCKET_DIR": str(runtime)}
        own, limit = str(Path("/proc/self/ns/mnt").readlink()), time.monotonic() + START_S
        while self._namespace() in {own, ""} and time.monotonic() < limit:
            time.sleep(0.01)
        self.run("ip", "link", "set", "lo", "up")
        self.run("mount", "-t", "tmpfs", "-o", "mode=0700", "tmpfs", str(runtime))

    def _namespace(self) -> str:
        try:
            if Path(f"/proc/{self.pid}/comm").read_text().strip() != "sleep":
                return ""
            return str(Path(f"/proc/{self.pid}/ns/mnt").readlink())
        except OSError:
            return ""

    def run(self, *command: str) -> str:
        """Run a command here; return what it prints."""
        done = subprocess.run(
            [*self.prefix, *command], capture_output=True, text=True, timeout=START_S, check=False
        )
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def cut(self) -> None:
        """Pull the cable."""
        self.run("ip", "link", "set", "eth0", "down")

    def close(self) -> None:
        """End it; what runs here loses its network with the last process."""
        self._process.kill()
        self._process.wait()


class Switch:
    """Hosts on one bridge, their links limited in what they send. Use as a context."""

    def __init__(self, count: int, runtime: Path, mbit: int = 0) -> None:
        self._switch = Host(runtime)
        self.hosts: list[Host] = []
        try:
            self._switch.run("ip", "link", "add", "br0", "type", "bridge")
            self._switch.run("ip", "link", "set", "br0", "up")
            for number in range(1, count + 1):
                self._plug(number, runtime, mbit)
        except BaseException:
            self.close()
            raise

    def _plug(self, number: int, runtime: Path, mbit: int) -> None:
        host, port = Host(runtime), f"port{number}"
        self.hosts.append(host)
        ends = [
            "netns",
            str(self._switch.pid),
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(host.pid),
        ]
        subprocess.run(["ip", "link", "add", port, *ends], check=True, timeout=START_S, capture_output=True)
        self._switch.run("ip", "link", "set", port, "master", "br0", "up")
        host.address = f"10.77.0.{number}"
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        if mbit:
            limit = ["rate", f"{mbit}mbit", "burst", "256kb", "latency", "100ms"]
            host.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)
        host.environment |= {"HEADRACE_BIND": host.address, "HEADRACE_ADVERTISE": host.address}

    def close(self) -> None:
        """End all hosts; idempotent."""
        for host in (*self.hosts, self._switch):
            host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def switched(count: int, runtime: Path, mbit: int = 0) -> Iterator[Sequence[Host]]:
    """Yield hosts on a switch; skip the test where this machine permits none."""
    lacking = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if lacking:
        pytest.skip(f"hosts as namespaces need {', '.join(lacking)}; apt-get install iproute2 util-linux")
    try:
        switch = Switch(count, runtime, mbit)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"namespaces are not permitted here: {error}")
    with switch:
        yield switch.hosts
