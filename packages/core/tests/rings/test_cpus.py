"""Which CPUs are near a GPU, from the files in which the kernel says so."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from headrace.rings.cpus import cpus_beside, keep_to

ADDRESS = "0000:1b:00.0"


def machine(root: Path, nodes: int, *, numa_node: str = "1", cpus: str = "") -> Path:
    for node in range(nodes):
        (root / f"devices/system/node/node{node}").mkdir(parents=True)
    device = root / "bus/pci/devices" / ADDRESS
    device.mkdir(parents=True)
    (device / "numa_node").write_text(numa_node)
    (device / "local_cpulist").write_text(cpus or f"{min(os.sched_getaffinity(0))}\n")
    return root


def test_one_node_makes_no_difference(tmp_path: Path) -> None:
    assert cpus_beside(ADDRESS, machine(tmp_path, 1)) == frozenset()


def test_cpus_of_the_gpus_node_that_this_process_may_use(tmp_path: Path) -> None:
    mine = min(os.sched_getaffinity(0))
    assert cpus_beside(ADDRESS, machine(tmp_path, 2, cpus=f"{mine},4000-4001")) == {mine}


@pytest.mark.parametrize(("node", "cpus"), [("-1", ""), ("1", "4000"), ("1", "nonsense"), ("", "")])
def test_what_is_not_known_binds_nothing(tmp_path: Path, node: str, cpus: str) -> None:
    assert cpus_beside(ADDRESS, machine(tmp_path, 2, numa_node=node, cpus=cpus)) == frozenset()
    assert cpus_beside("0000:ff:00.0", tmp_path) == frozenset()


def test_only_the_calling_thread_is_bound() -> None:
    before, bound = os.sched_getaffinity(0), []

    def work() -> None:
        keep_to(frozenset({min(before)}))
        bound.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert bound == [{min(before)}]
    assert os.sched_getaffinity(0) == before
    keep_to(frozenset())
    assert os.sched_getaffinity(0) == before
