"""Messages between a keeper and its members: what is held, leases, who reads from whom."""

from __future__ import annotations

import msgspec
import numpy as np

from headrace.manifest import Manifest
from headrace.wire.messages import Message


class MemberHello(Message, frozen=True):
    """First message of who wants to read what a keeper holds, to hold it too, or only to look."""

    token: str
    name: str
    pid: int


class AskOffer(Message, frozen=True):
    """What is held? With `lease` the version stays held until `EndLease` or the end of the connection."""

    lease: bool
    version: int | None = None


class Offer(Message, frozen=True):
    """A whole version: who holds it, and the sum of every parameter, in the order of the first manifest's."""

    version: int
    manifests: tuple[Manifest, ...]
    sums: np.ndarray


class Contribute(Message, frozen=True):
    """The member holds these as well: they are offered to others while it stays; empty to take them back."""

    offers: tuple[Offer, ...]


class EndLease(Message, frozen=True):
    """The member reads no more; `joined` says which engines serve the version now."""

    joined: tuple[str, ...] = ()


class Reading(Message, frozen=True):
    """How far a member is: bytes by the name of the holder that gave them, and bytes in all."""

    version: int
    from_holders: dict[str, int]
    total_bytes: int


class AskStanding(Message, frozen=True):
    """Who holds what, and who reads from whom?"""


class HolderStanding(msgspec.Struct, frozen=True):
    """One holder as a keeper knows it."""

    name: str
    host: str
    version: int
    num_bytes: int
    of_member: str = ""


class MemberStanding(msgspec.Struct, frozen=True):
    """One member as a keeper knows it; `from_holders` is bytes that it has read, by holder."""

    name: str
    version: int | None
    from_holders: dict[str, int]
    total_bytes: int
    connected_s: float
    joined: tuple[str, ...] = ()


class Standing(Message, frozen=True):
    """What a keeper knows."""

    holders: tuple[HolderStanding, ...]
    members: tuple[MemberStanding, ...]
