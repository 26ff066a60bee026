"""Encoding of messages: msgpack behind a header that every version can read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, get_origin

import msgspec
import numpy as np

from headrace.errors import RemoteProtocolError, VersionSkewError
from headrace.types import DTYPES, ParamMeta, ParamTable
from headrace.wire.members import (
    AskOffer,
    AskStanding,
    Contribute,
    EndLease,
    MemberHello,
    Offer,
    Reading,
    Standing,
)
from headrace.wire.messages import (
    Abort,
    Aborted,
    Broadcast,
    BroadcastDone,
    CancelBroadcast,
    Commit,
    Committed,
    Describe,
    Described,
    Digests,
    Failed,
    Fill,
    Filled,
    Finish,
    Finished,
    Heartbeat,
    HolderHello,
    JoinRing,
    Message,
    NeedMetas,
    Pin,
    Prepare,
    Prepared,
    Progress,
    Publish,
    Published,
    ReceiverHello,
    Refused,
    Release,
    RingReady,
    Settle,
    Settled,
    Shutdown,
    Stage,
    Staged,
    SumDigests,
)

PROTOCOL_VERSION = 2
_HEADER = struct.Struct("<4sH")
_MAGIC = b"HDRC"

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
