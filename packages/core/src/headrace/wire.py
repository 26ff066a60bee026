"""Messages of the control channel and their encoding: msgpack behind a header that every version can read.

Two frames per message: the header (magic, protocol version) and the body (one tagged struct). Arrays travel as raw
little-endian bytes; nothing is pickled. Data never travels here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, get_origin

import msgspec
import numpy as np

from headrace.errors import RemoteFailure, RemoteProtocolError, VersionSkewError, WeightsState
from headrace.manifest import HolderAddress, Manifest, SegmentDescriptor
from headrace.plan import BroadcastPlan, DigestTable, TransferPlan
from headrace.recipe import LoadRecipe
from headrace.telemetry import Span
from headrace.types import DTYPES, ParamMeta, ParamTable, VerifyMode, WorkerId

PROTOCOL_VERSION = 1
_HEADER = struct.Struct("<4sH")
_MAGIC = b"HDRC"


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of every control message; the struct's name is its tag."""


# ---- both ways


class Heartbeat(Message, frozen=True):
    """Nothing but a sign of life."""


class Failed(Message, frozen=True):
    """The peer could not do what it was last asked; it is ready for `Abort`."""

    failure: RemoteFailure


# ---- from a receiver or holder to the coordinator


class ReceiverHello(Message, frozen=True):
    """First message of an engine worker: who it is and what it serves."""

    update_id: str
    token: str
    worker: WorkerId
    world_size: int
    device: str
    weights_state: WeightsState
    served_version: int | None
    pending_version: int | None
    busy_with: str | None = None
    """Update that holds this receiver, if any; the coordinator must give up or wait."""


class HolderHello(Message, frozen=True):
    """First message of a holder process."""

    token: str
    index: int
    pid: int


class MemberHello(Message, frozen=True):
    """First message of who wants to read what a keeper holds, to hold it too, or only to look."""

    token: str
    name: str
    pid: int


class NeedMetas(Message, frozen=True):
    """The receiver has no recipe for this source and must be told its parameters."""


class Described(Message, frozen=True):
    """What a receiver needs, and what it can reach."""

    recipe_key: str
    recipe: LoadRecipe | None
    reachable: tuple[str, ...]
    budget_bytes: int
    first: bool
    spans: tuple[Span, ...] = ()


class Staged(Message, frozen=True):
    """Everything that can be fetched before the pause is there: the first vote."""

    spans: tuple[Span, ...] = ()


class Prepared(Message, frozen=True):
    """The receiver, paused, can still commit: the vote before the first byte."""


class Committed(Message, frozen=True):
    """Live tensors hold the new version: the vote after the last byte.

    `digests` has one uint64 per target, then per opaque buffer; empty where no digest was asked for.
    """

    digests: np.ndarray
    spans: tuple[Span, ...] = ()


class Finished(Message, frozen=True):
    """The engine reports the new version; the session is over."""

    spans: tuple[Span, ...] = ()


class Aborted(Message, frozen=True):
    """The update is forgotten; `weights_state` tells what the live tensors hold."""

    weights_state: WeightsState


class Progress(Message, frozen=True):
    """How far a long piece of work is, in bytes."""

    done_bytes: int
    total_bytes: int


class Published(Message, frozen=True):
    """A holder has a version complete in its segments; `manifest` is None where the coordinator has its layout."""

    layout: str
    manifest: Manifest | None
    spans: tuple[Span, ...] = ()


class Filled(Message, frozen=True):
    """A holder has the regions that `Fill` named."""

    spans: tuple[Span, ...] = ()


class Digests(Message, frozen=True):
    """Sums that a holder was asked for, by the request's key."""

    key: str
    sums: np.ndarray


class RingReady(Message, frozen=True):
    """A holder has joined the group and made its ring; receivers may map it."""

    ring: SegmentDescriptor
    signals: SegmentDescriptor


class Settled(Message, frozen=True):
    """A holder does nothing any more of what it was asked before `Settle`."""

    nonce: str


class BroadcastDone(Message, frozen=True):
    """A holder has passed every bucket on, and its receivers have taken them."""

    spans: tuple[Span, ...] = ()


# ---- from the coordinator to a receiver


class Refused(Message, frozen=True):
    """The coordinator does not take this peer; the connection is over."""

    failure: RemoteFailure


class Describe(Message, frozen=True):
    """Ask a receiver for its recipe; `metas` is sent only after `NeedMetas`."""

    metas_key: str
    metas: ParamTable | None
    holders: tuple[HolderAddress, ...]
    known_recipes: tuple[str, ...] = ()


class RingAddress(msgspec.Struct, frozen=True):
    """Where a receiver finds the ring of its broadcasting holder, and which signal word is its own."""

    holder: HolderAddress
    ring: SegmentDescriptor
    signals: SegmentDescriptor
    slot_index: int


class Stage(Message, frozen=True):
    """Fetch what can be fetched while the engine serves."""

    version: int
    plan: TransferPlan
    holders: tuple[HolderAddress, ...]
    verify: VerifyMode
    deadline_s: float
    ring: RingAddress | None = None


class Prepare(Message, frozen=True):
    """The engine is paused: say whether the commit can begin."""


class Commit(Message, frozen=True):
    """Write the live tensors; may be repeated."""

    deadline_s: float


class Finish(Message, frozen=True):
    """All ranks have committed: report the version."""

    version: int


class Abort(Message, frozen=True):
    """Forget the update. `spoiled`: what was committed is not what the source holds, so it is `mixed`."""

    reason: str
    spoiled: bool = False


# ---- from the coordinator to a holder


class Publish(Message, frozen=True):
    """Read the source and complete a version; `known_layouts` need not be sent again."""

    version: int
    known_layouts: tuple[str, ...] = ()


class Fill(Message, frozen=True):
    """Copy the weights of a trainer's step into a placed version: the regions of these rows of its manifest."""

    version: int
    step: int
    rows: np.ndarray


class SumDigests(Message, frozen=True):
    """Sum digests over regions of a version."""

    key: str
    version: int
    table: DigestTable
    num_groups: int


class JoinRing(Message, frozen=True):
    """Join the broadcast group (made once and kept) and make a ring for an update."""

    rank: int
    world_size: int
    store: str
    """`host:port` of the rendezvous store."""
    ring_bytes: int
    num_receivers: int


class Broadcast(Message, frozen=True):
    """Run buckets through the ring, as member `member` of the group."""

    version: int
    plan: BroadcastPlan
    member: int
    holder_of_member: tuple[int, ...]
    deadline_s: float


class CancelBroadcast(Message, frozen=True):
    """Stop the running broadcast; the ring is dropped."""


class Settle(Message, frozen=True):
    """End whatever is under way and say so: what was sent before this answer belongs to an update that failed."""

    nonce: str


class Release(Message, frozen=True):
    """A version is not needed any more."""

    version: int


class Shutdown(Message, frozen=True):
    """The holder's work is over; it leaves."""


# ---- between a keeper and its members


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


class Pin(Message, frozen=True):
    """To a holder: keep a version whatever is published, until `pinned` is False."""

    version: int
    pinned: bool


AnyMessage = (
    Heartbeat
    | Failed
    | ReceiverHello
    | HolderHello
    | MemberHello
    | AskOffer
    | Offer
    | Contribute
    | EndLease
    | Reading
    | AskStanding
    | Standing
    | Pin
    | NeedMetas
    | Described
    | Staged
    | Prepared
    | Committed
    | Finished
    | Aborted
    | Progress
    | Published
    | Filled
    | Digests
    | RingReady
    | BroadcastDone
    | Refused
    | Describe
    | Stage
    | Prepare
    | Commit
    | Finish
    | Abort
    | Publish
    | Fill
    | Settle
    | Settled
    | SumDigests
    | JoinRing
    | Broadcast
    | CancelBroadcast
    | Release
    | Shutdown
)


def _to_builtins(value: object) -> object:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return (array.dtype.str, array.shape, array.tobytes())
    if isinstance(value, ParamTable):
        return ([m.name for m in value], value.dtype_codes.tobytes(), [m.shape for m in value])
    message = f"{type(value).__name__} has no place in a message"
    raise TypeError(message)


_ALLOWED_ARRAYS = frozenset({"<i8", "<i4", "|u1", "<u8", "<f8"})


def _from_builtins(kind: Any, value: Any) -> object:  # noqa: ANN401 - any type, any data
    if kind is ParamTable:
        return _param_table(value)
    if kind is np.ndarray or get_origin(kind) is np.ndarray:
        return _array(value)
    message = f"{kind} has no place in a message"
    raise TypeError(message)


def _array(value: Sequence[Any]) -> np.ndarray:
    code, shape, data = value
    if code not in _ALLOWED_ARRAYS:
        message = f"arrays of {code!r} have no place in a message"
        raise ValueError(message)
    return np.frombuffer(data, dtype=code).reshape(shape)


def _param_table(value: Sequence[Any]) -> ParamTable:
    names, codes, shapes = value
    if len(names) != len(codes) or len(names) != len(shapes):
        message = "a parameter table's columns differ in length"
        raise ValueError(message)
    return ParamTable(
        ParamMeta(name, DTYPES[code].name, tuple(shape))
        for name, code, shape in zip(names, codes, shapes, strict=True)
    )


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_builtins)
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage, dec_hook=_from_builtins)
_HEADER_BYTES = _HEADER.pack(_MAGIC, PROTOCOL_VERSION)


def encode(message: Message) -> list[bytes]:
    """Return the frames of one message."""
    return [_HEADER_BYTES, _encoder.encode(message)]


def decode(frames: Sequence[bytes]) -> AnyMessage:
    """Return the message in `frames`.

    Raises:
        VersionSkewError: The peer speaks another protocol version.
        RemoteProtocolError: It is no message of ours.
    """
    if not frames or len(frames[0]) != _HEADER.size or not frames[0].startswith(_MAGIC):
        message = f"a peer sent {len(frames)} frames that are no Headrace message"
        raise RemoteProtocolError(message)
    version = _HEADER.unpack(frames[0])[1]
    if version != PROTOCOL_VERSION:
        message = (
            f"the peer speaks protocol {version}, this side {PROTOCOL_VERSION}; "
            "install the same headrace version on both"
        )
        raise VersionSkewError(message)
    if len(frames) != 2:
        message = f"a message has 2 frames, this one {len(frames)}"
        raise RemoteProtocolError(message)
    try:
        return _decoder.decode(frames[1])
    except (msgspec.DecodeError, ValueError, TypeError, IndexError) as error:
        message = f"a peer sent a damaged message: {error}"
        raise RemoteProtocolError(message) from error


__all__ = [
    name for name, value in list(globals().items()) if isinstance(value, type) and issubclass(value, Message)
]
__all__ += [
    "PROTOCOL_VERSION",
    "RingAddress",
    "decode",
    "encode",
]
