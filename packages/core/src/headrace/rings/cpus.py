"""Which CPUs are near a GPU: threads that feed it stay there, where the host has more than one NUMA node."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from headrace.config import cpu_set
from headrace.errors import ConfigError

logger = logging.getLogger(__name__)
_SYSTEM = Path("/sys")


def cpus_beside(pci_address: str, system: Path = _SYSTEM) -> frozenset[int]:
    """Return the CPUs of a PCI device's NUMA node that this process may use; none where that makes no difference.

    Args:
        pci_address: As `/sys/bus/pci/devices` names it.
        system: Where the kernel shows its devices.
    """
    if len(list((system / "devices/system/node").glob("node[0-9]*"))) < 2:
        return frozenset()
    folder = system / "bus/pci/devices" / pci_address
    try:
        if int((folder / "numa_node").read_text(encoding="ascii")) < 0:
            return frozenset()
        listed = (folder / "local_cpulist").read_text(encoding="ascii").strip()
        return cpu_set(listed, "local_cpulist") & os.sched_getaffinity(0)
    except (OSError, ValueError, ConfigError) as error:
        logger.debug("no CPUs beside %s are known: %s", pci_address, error)
        return frozenset()


def keep_to(cpus: frozenset[int]) -> None:
    """Have the calling thread, and those it starts, run on these CPUs only; nothing where there are none."""
    if cpus:
        os.sched_setaffinity(0, cpus)
