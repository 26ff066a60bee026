"""Messages of an update: base, both ways, from receivers and holders to the coordinator, and from it to them."""

from __future__ import annotations

import msgspec
import numpy as np

from headrace.errors import RemoteFailure, WeightsState
from headrace.manifest import HolderAddress, Manifest, SegmentDescriptor
from headrace.plan import BroadcastPlan, DigestTable, TransferPlan
from headrace.recipe import LoadRecipe
from headrace.telemetry import Span
from headrace.types import ParamTable, VerifyMode, WorkerId


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
    device_uuid: str = ""
    """The GPU of its live tensors, as torch names it; empty on a CPU."""


class HolderHello(Message, frozen=True):
    """First message of a holder process."""

    token: str
    index: int
    pid: int


class NeedMetas(Message, frozen=True):
    """The receiver has no recipe for this source and must be told its parameters."""


class Described(Message, frozen=True):
    """What a receiver needs, and what it can reach."""

    recipe_key: str
    recipe: LoadRecipe | None
    reachable: tuple[str, ...]
    budget_bytes: int
    reserved_bytes: int
    first: bool
    spans: tuple[Span, ...] = ()


class Staged(Message, frozen=True):
    """Everything that can be fetched before the pause is there: the first vote."""

    spans: tuple[Span, ...] = ()


class Prepared(Message, frozen=True):
    """The receiver, paused or held, can still commit: the vote before the first byte.

    Held in a world of several ranks, it waits from here on for the coordinator's word or ends its process.
    """


class Committed(Message, frozen=True):
    """Live tensors hold the new version: the vote after the last byte.

    `digests` has one uint64 per target, then per opaque buffer; empty where no digest was asked for.
    """

    digests: np.ndarray
    spans: tuple[Span, ...] = ()


class Finished(Message, frozen=True):
    """The engine reports the new version; the session is over. `held_s`: how long the worker was held for it."""

    spans: tuple[Span, ...] = ()
    held_s: float = 0.0


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
    """A holder has made its ring, and joined the group if it was told to; receivers may open it.

    `refused` says why there can be none on the GPU that was asked for; then there is none.
    """

    ring: SegmentDescriptor | None
    signals: SegmentDescriptor | None
    refused: str = ""


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
    """Say whether the commit can begin: the engine is paused, or its worker will be held within `hold_s`."""

    hold_s: float | None = None


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
    deadline_s: float
    known_layouts: tuple[str, ...] = ()


class Fill(Message, frozen=True):
    """Copy the weights of a trainer's step into a placed version: the regions of these rows of its manifest."""

    version: int
    step: int
    rows: np.ndarray
    deadline_s: float


class SumDigests(Message, frozen=True):
    """Sum digests over regions of a version."""

    key: str
    version: int
    table: DigestTable
    num_groups: int


class JoinRing(Message, frozen=True):
    """Make a ring for an update and join the broadcast group (made once and kept)."""

    rank: int
    world_size: int
    store: str
    """`host:port` of the rendezvous store; empty to make only the ring."""
    ring_bytes: int
    num_receivers: int
    device_uuid: str = ""
    """GPU whose memory the slots lie in, and which NCCL broadcasts; empty for host memory and gloo."""


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


class Pin(Message, frozen=True):
    """To a holder: keep a version whatever is published, until `pinned` is False."""

    version: int
    pinned: bool
