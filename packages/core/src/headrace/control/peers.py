"""What the coordinator knows of the processes that dialled it."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.wire import AnyMessage


@dataclass(frozen=True, slots=True)
class PeerId:
    """One connected peer; equal by identity, readable by label."""

    identity: bytes
    label: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.label or self.identity.hex()


@dataclass(frozen=True, slots=True)
class Received:
    """A peer said something; its hello comes first."""

    peer: PeerId
    message: AnyMessage


@dataclass(frozen=True, slots=True)
class Lost:
    """A peer is gone: nothing more comes from it, nothing reaches it."""

    peer: PeerId
    reason: str


Event = Received | Lost
