"""How long weights take in a cluster that need not exist: links that fill, read by read, and the bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.errors import PlanError
from headrace.planner.assignment import Assignment, assign
from headrace.types import I32, I64

GB = 10**9
PIECE_BYTES = 64 << 20
MOST_READS = 1 << 21


@dataclass(frozen=True, kw_only=True, slots=True)
class Fabric:
    """Hosts and their links, all alike.

    Attributes:
        hosts: Number of hosts.
        gpus: GPUs of each host.
        nics: NICs of each host.
        nic_gb_s: What one NIC moves, in GB/s, each way.
        pcie_gb_s: What the link of one GPU moves, in GB/s.
    """

    hosts: int
    gpus: int = 8
    nics: int = 8
    nic_gb_s: float = 50.0
    pcie_gb_s: float = 50.0

    @property
    def num_ranks(self) -> int:
        """GPUs in all."""
        return self.hosts * self.gpus

    def links_of(self, hosts: I64) -> I64:
        """Return the numbers of the NICs of some hosts."""
        return np.asarray((hosts[:, None] * self.nics + np.arange(self.nics)).reshape(-1), np.int64)


@dataclass(frozen=True)
class Prediction:
    """What one route would take.

    Attributes:
        route: Its name.
        seconds: Time until the last rank has its weights, links alone deciding.
        bound_s: No plan over these links can be done earlier.
        network_bytes: Bytes into the host that gets most.
        why: Which links decide.
    """

    route: str
    seconds: float
    bound_s: float
    network_bytes: int
    why: str

    @property
    def share(self) -> float:
        """The bound as a fraction of the prediction."""
        return self.bound_s / self.seconds if self.seconds else 1.0


@dataclass(frozen=True)
class Layout:
    """Which hosts hold which parts of a version, and which must get it.

    Attributes:
        part_bytes: Size of each part.
        holders: Per part, the hosts that hold it.
        readers: Hosts that must have the whole version at the end.
    """

    part_bytes: I64
    holders: Sequence[I64]
    readers: I64

    @classmethod
    def divided(cls, num_bytes: int, hosts: int) -> Layout:
        """Every host has read its own part from disk, and needs the others': an update under torchrun."""
        parts = np.full(hosts, num_bytes // hosts, np.int64)
        parts[: num_bytes % hosts] += 1
        return cls(parts, [np.array([host]) for host in range(hosts)], np.arange(hosts))

    @classmethod
    def joining(cls, num_bytes: int, holders: int, joiners: int) -> Layout:
        """The first hosts hold the whole version, the next ones join."""
        return cls(np.array([num_bytes]), [np.arange(holders)], holders + np.arange(joiners))

    @classmethod
    def sharded(cls, num_bytes: int, shards: int, replicas: int, hosts: int, readers: int) -> Layout:
        """A trainer's hosts hold shards, each shard on `replicas` of them; other hosts join."""
        parts = np.full(shards, num_bytes // shards, np.int64)
        holders = [np.unique((shard + np.arange(replicas) * shards) % hosts) for shard in range(shards)]
        return cls(parts, holders, hosts + np.arange(readers))


def predict_p2p(fabric: Fabric, layout: Layout) -> tuple[Prediction, Assignment, Assignment]:
    """Return what reading from all holders takes, with the assignments to giving and to receiving NICs.

    Every reader reads each byte that it lacks once. The model is fluid: a link moves its bytes at full speed and
    reads do not wait for each other.

    Raises:
        PlanError: A part is held by nobody, or hosts are named that the fabric lacks.
    """
    named = np.concatenate([layout.readers, *layout.holders])
    if len(named) and int(named.max()) >= fabric.hosts:
        raise PlanError(
            f"host {named.max()} is named, but there are {fabric.hosts}; give hosts={named.max() + 1}"
        )
    num_bytes, part, reader = _reads(layout)
    rates = np.full(fabric.hosts * fabric.nics, fabric.nic_gb_s * GB)
    giving = assign(num_bytes, part, [fabric.links_of(hosts) for hosts in layout.holders], rates)
    # Links are dealt out in runs; a reader's runs must not meet the same givers, so reads are taken in another order.
    readers, group = np.unique(reader, return_inverse=True)
    links = [fabric.links_of(np.array([host])) for host in readers.tolist()]
    taking = assign(num_bytes, group.reshape(-1).astype(np.int32), links, rates)
    seconds = max(giving.seconds, taking.seconds)
    bound_s = max(giving.bound_s, taking.bound_s)
    most = int(np.bincount(group.reshape(-1), num_bytes).max(initial=0)) if len(num_bytes) else 0
    why = "NICs of the holders" if giving.bound_s > taking.bound_s else "NICs of the readers"
    return Prediction("p2p", seconds, bound_s, most, why), giving, taking


def _reads(layout: Layout) -> tuple[I64, I32, I64]:
    """Return size, part and reader of every read: parts cut into pieces, for each reader that lacks them."""
    count = np.array([np.isin(layout.readers, hosts, invert=True).sum() for hosts in layout.holders])
    wanted = int((-(-layout.part_bytes // PIECE_BYTES) * count).sum())
    piece = PIECE_BYTES * max(1, -(-wanted // MOST_READS))
    sizes: list[I64] = []
    parts: list[I64] = []
    readers: list[I64] = []
    for number, hosts in enumerate(layout.holders):
        lacking = layout.readers[np.isin(layout.readers, hosts, invert=True)]
        total = int(layout.part_bytes[number])
        pieces = np.full(-(-total // piece), piece, np.int64)
        if len(pieces):
            pieces[-1] = total - piece * (len(pieces) - 1)
        sizes.append(np.tile(pieces, len(lacking)))
        readers.append(np.repeat(lacking, len(pieces)))
        parts.append(np.full(len(sizes[-1]), number, np.int64))
    return np.concatenate(sizes), np.concatenate(parts).astype(np.int32), np.concatenate(readers)


def predict_direct(fabric: Fabric, num_bytes: int, tp: int) -> Prediction:
    """Return what pulling every worker's own shard over its own link takes, the version lying on its host."""
    seconds = num_bytes / tp / (fabric.pcie_gb_s * GB)
    return Prediction("direct", seconds, seconds, 0, "each GPU's own link")


def predict_broadcast(fabric: Fabric, num_bytes: int, bucket_bytes: int = PIECE_BYTES) -> Prediction:
    """Return what a broadcast of everything to every host takes, three stages overlapped over buckets."""
    links = fabric.num_ranks * fabric.pcie_gb_s * GB
    network = fabric.nics * fabric.nic_gb_s * GB if fabric.hosts > 1 else np.inf
    reload_s = num_bytes / (fabric.gpus * fabric.pcie_gb_s * GB)
    bound_s = max(num_bytes / links, num_bytes / network, reload_s)
    buckets = max(1, num_bytes // bucket_bytes)
    why = "network" if num_bytes / network >= reload_s else "the GPUs' links of a host"
    return Prediction("broadcast", bound_s * (1 + 2 / buckets), bound_s, num_bytes, why)


def predict_all(fabric: Fabric, num_bytes: int, tp: int, layout: Layout) -> list[Prediction]:
    """Return every route that gets a version of `num_bytes` into every reader's GPUs.

    p2p is what is built: the whole version into the host's memory first, `direct` from there afterwards; the engine
    stands still only for the second part. A broadcast is left out where some hosts only give: all would have to take
    part in it.
    """
    direct = predict_direct(fabric, num_bytes, tp)
    if fabric.hosts == 1:
        return [direct, predict_broadcast(fabric, num_bytes)]
    network, _, _ = predict_p2p(fabric, layout)
    both = Prediction(
        "p2p",
        network.seconds + direct.seconds,
        network.bound_s + direct.bound_s,
        network.network_bytes,
        f"{network.why}, then each GPU's own link",
    )
    takes_all = len(layout.readers) == fabric.hosts
    return [both, predict_broadcast(fabric, num_bytes)] if takes_all else [both]
