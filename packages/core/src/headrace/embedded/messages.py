"""What front and workers of the embedded engine say to each other: msgpack over a socket pair."""

from __future__ import annotations

import msgspec

from headrace.errors import HeadraceError, RemoteFailure, WeightsState
from headrace.protocols import Ticket


class Startup(msgspec.Struct, frozen=True):
    """First message to a worker: who it is and what it loads."""

    instance: str
    rank: int
    world_size: int
    model: str
    device: str
    dtype: str
    load_format: str
    rendezvous: str
    start_s: float


class Job(msgspec.Struct, frozen=True, array_like=True):
    """One request's part of a step: feed `tokens`, sample the one that follows.

    Attributes:
        request: Request id.
        tokens: Prompt and all generated tokens where `fresh`, else the last token.
        fresh: Make a new KV cache first.
        temperature: 0 is greedy.
        seed: With `position` the whole state of sampling.
        position: Number of tokens before the sampled one.
    """

    request: int
    tokens: list[int]
    fresh: bool
    temperature: float
    seed: int
    position: int


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Make one token for each job; first forget the caches of requests that have `ended`."""

    jobs: list[Job]
    ended: list[int]


class DropCaches(msgspec.Struct, frozen=True, tag="drop"):
    """Forget every KV cache."""


class Enrol(msgspec.Struct, frozen=True, tag="enrol"):
    """Hand a ticket to the worker's receiver."""

    ticket: Ticket


class GetStatus(msgspec.Struct, frozen=True, tag="status"):
    """Ask for the state of the weights."""


class GetFingerprints(msgspec.Struct, frozen=True, tag="fingerprints"):
    """Ask for sha256 sums of every live tensor."""


class Exit(msgspec.Struct, frozen=True, tag="exit"):
    """Leave; there is no reply."""


Command = Step | DropCaches | Enrol | GetStatus | GetFingerprints | Exit


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """Which weights a worker saw at one moment; an odd epoch means that a commit is in progress."""

    version: int | None
    epoch: int

    @property
    def settled(self) -> bool:
        """Whether no commit is in progress."""
        return self.epoch % 2 == 0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded."""

    vocab_size: int
    max_positions: int
    stop_tokens: list[int]


class Stepped(msgspec.Struct, frozen=True, tag="stepped"):
    """A step is done; only rank 0 samples, others reply no tokens."""

    tokens: list[int]
    begin: Seen
    end: Seen


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A command without a result is done."""


class WorkerStatus(msgspec.Struct, frozen=True, tag="status"):
    """State of one worker's weights."""

    rank: int
    pid: int
    weights_state: WeightsState
    version: int | None
    epoch: int
    num_caches: int


class ShardBox(msgspec.Struct, frozen=True):
    """A half-open box of the whole tensor that the shard holds."""

    offsets: list[int]
    shape: list[int]


class Fingerprint(msgspec.Struct, frozen=True):
    """sha256 of one rank's shard: its boxes, joined along `dim`, row-major, in `dtype`."""

    name: str
    dtype: str
    shape: list[int]
    local_shape: list[int]
    boxes: list[ShardBox]
    dim: int
    sha256: str


class Fingerprints(msgspec.Struct, frozen=True, tag="fingerprints"):
    """Fingerprints of all live tensors of one rank."""

    rank: int
    tensors: list[Fingerprint]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A command or the start failed."""

    rank: int
    failure: RemoteFailure

    def to_error(self) -> HeadraceError:
        """Return the failure as an error that names the rank."""
        error = self.failure.to_error()
        error.args = (f"worker {self.rank}: {error}",)
        error.rank = self.rank
        return error


Reply = Ready | Stepped | Done | WorkerStatus | Fingerprints | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
decode_startup = msgspec.msgpack.Decoder(Startup).decode
