"""What exists: segments of memory that a holder lends, and the manifest of regions that lie in them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from headrace.geometry import RegionTable
from headrace.types import ParamTable

SegmentKind = Literal["host", "cuda"]


@dataclass(frozen=True, slots=True)
class SegmentDescriptor:
    """What a peer needs to open one segment; it may travel, it owns nothing.

    Attributes:
        segment_id: Random, unique for the life of the memory; a peer keeps its mapping under this key.
        kind: `host` (memfd, passed over the holder's unix socket) or `cuda` (CUDA IPC).
        num_bytes: Size of the segment.
        ipc_handle: CUDA IPC handle where kind is `cuda`.
        device_uuid: The GPU that the memory lies on where kind is `cuda`.
    """

    segment_id: str
    num_bytes: int
    kind: SegmentKind = "host"
    ipc_handle: bytes = b""
    device_uuid: str = ""


@dataclass(frozen=True, slots=True)
class HolderAddress:
    """How to reach one holder's memory.

    Attributes:
        holder_id: Unique name of the holder process.
        unix_socket: Path of the socket that passes file descriptors; empty if it lends none.
        tcp_endpoint: `host:port` of its data server; empty if it serves none.
        tcp_secret: Key of the data server's challenge; travels only inside the encrypted control channel.
        mooncake: `host:port` of its Mooncake helper; empty if it runs none.
    """

    holder_id: str
    unix_socket: str = ""
    tcp_endpoint: str = ""
    tcp_secret: bytes = b""
    mooncake: str = ""


@dataclass(frozen=True)
class Manifest:
    """Every region one holder has, for one version.

    `regions.param` indexes `params`, `regions.block` indexes `segments`, bytes are in `params`' dtypes.
    """

    holder: HolderAddress
    version: int
    params: ParamTable
    segments: tuple[SegmentDescriptor, ...]
    regions: RegionTable

    def of_version(self, version: int) -> Manifest:
        """Return the same manifest for another version; tables and their keys are shared."""
        same = Manifest(self.holder, version, self.params, self.segments, self.regions)
        same.__dict__["layout_key"] = self.layout_key
        return same

    @cached_property
    def layout_key(self) -> str:
        """Digest of what lies where, without version, address and segment ids: equal layouts, equal plans."""
        sizes = [segment.num_bytes for segment in self.segments]
        return hashlib.sha256(f"{self.params.key}{sizes}{self.regions.key}".encode()).hexdigest()[:32]

    @cached_property
    def place_key(self) -> str:
        """Digest of the layout and of where it lies: all of the manifest but the version."""
        place = f"{self.layout_key}{self.holder}{[segment.segment_id for segment in self.segments]}"
        return hashlib.sha256(place.encode()).hexdigest()[:32]
