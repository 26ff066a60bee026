"""Interfaces as the kernel lists them, from folders that look like its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import ConfigError
from headrace.transports.nics import RdmaDevice, TcpInterface, rdma_devices, select, tcp_interfaces


@pytest.fixture
def infiniband(tmp_path: Path) -> Path:
    for number, state in ((0, "4: ACTIVE"), (1, "4: ACTIVE"), (2, "1: DOWN"), (10, "4: ACTIVE")):
        for port in (1, 2) if number == 1 else (1,):
            folder = tmp_path / f"mlx5_{number}" / "ports" / str(port)
            folder.mkdir(parents=True)
            (folder / "state").write_text(f"{state}\n")
            (folder / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (tmp_path / f"mlx5_{number}" / "device").mkdir()
        (tmp_path / f"mlx5_{number}" / "device" / "numa_node").write_text(f"{number % 2}\n")
    return tmp_path


def test_devices_are_found_in_the_order_of_their_numbers(infiniband: Path) -> None:
    found = rdma_devices(infiniband)
    assert [(d.name, d.port) for d in found] == [
        ("mlx5_0", 1), ("mlx5_1", 1), ("mlx5_1", 2), ("mlx5_2", 1), ("mlx5_10", 1),
    ]  # fmt: skip
    assert found[1] == RdmaDevice("mlx5_1", 1, 400.0, active=True, numa_node=1)
    assert [d.name for d in found if not d.active] == ["mlx5_2"]
    assert rdma_devices(infiniband / "nothing") == []


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["mlx5_0:1", "mlx5_1:1", "mlx5_1:2", "mlx5_10:1"]),
        ("mlx5_1", ["mlx5_1:1", "mlx5_1:2", "mlx5_10:1"]),
        ("=mlx5_1", ["mlx5_1:1", "mlx5_1:2"]),
        ("=mlx5_1:2,mlx5_0", ["mlx5_0:1", "mlx5_1:2"]),
        ("^mlx5_1", ["mlx5_0:1"]),
        ("^=mlx5_1:1", ["mlx5_0:1", "mlx5_1:2", "mlx5_10:1"]),
    ],
)
def test_patterns_are_those_of_nccl(infiniband: Path, pattern: str, names: list[str]) -> None:
    assert [f"{d.name}:{d.port}" for d in select(rdma_devices(infiniband), pattern)] == names


@pytest.mark.parametrize("pattern", ["mlx4", "=mlx5", "mlx5_2", "a b", "mlx5_0:x", "^mlx5"])
def test_patterns_that_name_nothing(infiniband: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match="mlx5_0"):
        select(rdma_devices(infiniband), pattern)


def test_tcp_interfaces(tmp_path: Path) -> None:
    for name, speed, state in (("lo", "", "unknown"), ("eth0", "25000", "up"), ("docker0", "-1", "down")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "speed").write_text(speed)
        (tmp_path / name / "operstate").write_text(state)
    found = tcp_interfaces(tmp_path)
    assert found == [
        TcpInterface("docker0", 0.0, active=False),
        TcpInterface("eth0", 25.0, active=True),
        TcpInterface("lo", 0.0, active=True),
    ]
    assert [one.name for one in select(found, "^lo")] == ["eth0"]
    assert "lo" in [one.name for one in tcp_interfaces()]
