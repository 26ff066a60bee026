"""The four contracts of Headrace: engine worker, engine control, weight source, transport.

An adapter implements `InferenceBackend` and `EngineControl`; a trainer hook implements `WeightSource`; a wire
implements `Transport`. `headrace.testing` holds a conformance suite for each. torch is imported for types only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from headrace.geometry import Box
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.plan import CopyTable
from headrace.types import CacheMode, ParamTable, WorkerId

if TYPE_CHECKING:
    import torch

NamedTensors = Iterable[tuple[str, "torch.Tensor"]]


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who a worker is and what shapes its loader.

    Attributes:
        worker: Instance and rank.
        world_size: Number of workers of the instance.
        device: torch device string, `cpu` or `cuda:0`.
        device_uuid: Physical device; workers on one device share it.
        layout: Everything besides the source that decides what the loader does: model class and config digest,
            parallel sizes and ranks, quantisation, engine and adapter version. The recipe cache's key.
    """

    worker: WorkerId
    world_size: int
    device: str
    device_uuid: str
    layout: str


@dataclass(frozen=True)
class Skeleton:
    """The model's structure on the meta device, with its loader: what a recipe is recorded on.

    Attributes:
        tensors: Parameters and loadable buffers by the engine's name, on the meta device, in the layout that the
            loader writes to (before any repacking).
        load: The engine's loader, bound to the skeleton.
        for_source: Where it depends on the source what is loaded (a draft model that not every checkpoint has): returns
            the skeleton for a source with these parameters. Asked once per source, before anything of it is loaded.
    """

    tensors: Mapping[str, torch.Tensor]
    load: Callable[[NamedTensors], object]
    for_source: Callable[[ParamTable], Skeleton] | None = None


@runtime_checkable
class InferenceBackend(Protocol):
    """One engine worker as the receiver sees it. Lives in the worker's process; never called concurrently.

    Call order:
        1. `identity`, `live_tensors`, `skeleton`, `derived`, `optional` - any time after the model is loaded, while
           the engine serves; they change nothing.
        2. `loaded_from` - once, to prove the recipe against what the engine itself loaded.
        3. Per update, engine paused or worker held: `commit_scope` is entered; live tensors are written; then, only if
           something is opaque, `begin_reload`, `load`, `end_reload`; then `rederive`; the scope is left. Where one of
           them fails, the reload is over: the commit that tries again begins another.
        4. `set_version` - when all ranks of the instance have succeeded.
    """

    def identity(self) -> WorkerIdentity:
        """Return who this worker is. Constant over the worker's life."""
        ...

    def live_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors that forward steps read, by the engine's name: this rank's shards, no copies.

        Writing to them in place changes what the model computes. Pointers may change after `end_reload`.
        """
        ...

    def skeleton(self) -> Skeleton | None:
        """Return what to record on, or None where the engine cannot give one (all updates then use `load`)."""
        ...

    def loaded_from(self) -> str | None:
        """Return the checkpoint folder that the live weights came from, or None (dummy weights, later updates)."""
        ...

    def load(self, pairs: NamedTensors) -> None:
        """Run the engine's own loader on full tensors in checkpoint naming. Blocking; tensors are the engine's to keep.

        Raises:
            Exception: Whatever the engine raises; the receiver reports it as `ApplyError`.
        """
        ...

    def begin_reload(self) -> None:
        """Enter the engine's reload life cycle; a no-op where weights keep their loader's layout."""
        ...

    def end_reload(self) -> None:
        """Leave the reload life cycle: repack, quantise, rebuild what the engine derives."""
        ...

    def reload_unit(self, name: str) -> str:
        """Return the unit that a live tensor is reloaded with; all sources of a unit are loaded together, whole."""
        ...

    def optional(self, name: str) -> bool:
        """Return whether a live tensor may stay as it is when the source has nothing for it (KV scales)."""
        ...

    def derived(self) -> Mapping[str, Sequence[str]]:
        """Return tensors computed from weights after loading: their name to the live tensors that feed them."""
        ...

    def rederive(self, names: Sequence[str]) -> bool:
        """Compute derived tensors again in place after their inputs changed; False where the engine cannot.

        Called with an empty sequence to ask. Where False, the inputs go through the loader instead.
        """
        ...

    def free_memory_bytes(self) -> int:
        """Return the memory that staging may take beside the engine, where the worker's staging lives."""
        ...

    def commit_scope(self) -> AbstractContextManager[None]:
        """Return a context in which writes to live tensors are ordered against forward steps (the commit's stream)."""
        ...

    def set_version(self, version: int) -> None:
        """Make the engine report `version` from the next token on. Called only after success on all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Ticket:
    """What HTTP or RPC carries to an engine so that its receivers can dial in. One use, one update.

    Attributes:
        update_id: Random id of the update.
        endpoint: ZeroMQ endpoint of the coordinator.
        server_key: The coordinator's CURVE public key, Z85.
        token: One-time token that every receiver must present.
    """

    update_id: str
    endpoint: str
    server_key: str
    token: str


@runtime_checkable
class EngineControl(Protocol):
    """One engine instance as the updater sees it. Lives in the updater, speaks the engine's own interface.

    Call order: 1. `wait_ready`. 2. `expected_receivers`, `enrol`. 3. `pause`. 4. `confirm`. 5. `resume`. 6. `close`.
    Every call blocks at most `deadline_s` seconds; all are idempotent.
    """

    @property
    def address(self) -> str:
        """The engine as the user named it, for messages."""
        ...

    def wait_ready(self, deadline_s: float) -> None:
        """Wait until the engine answers.

        Raises:
            ConnectError: It did not within the deadline; says what was tried and what came back.
        """
        ...

    def expected_receivers(self, deadline_s: float) -> int:
        """Return how many workers will enrol, over all data-parallel replicas behind this address."""
        ...

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:
        """Hand the ticket to every worker; returns when they were told, not when they have dialled."""
        ...

    def pause(self, cache: CacheMode, deadline_s: float) -> None:
        """Stop forward steps and keep requests; with `recompute` no KV of the old weights is used afterwards."""
        ...

    def confirm(self, version: int, deadline_s: float) -> None:
        """Tell the engine's front which version its workers now hold, all of them; nothing to do where they say it.

        Called while paused, after every rank has succeeded.
        """
        ...

    def resume(self, deadline_s: float) -> None:
        """Let forward steps go on."""
        ...

    def served_version(self, deadline_s: float) -> int | None:
        """Return the version that the engine reports, or None where it has none yet."""
        ...

    def close(self) -> None:
        """Release connections; the engine is not touched."""
        ...


@runtime_checkable
class HoldingControl(EngineControl, Protocol):
    """An EngineControl whose engine can also be held: its workers stand still inside one call, without a pause.

    Call order: 1. `hold_obstacle`. 2. `enrol` as ever. 3. `hold`, in place of `pause` and `resume`. 4. `confirm`.
    """

    def hold_obstacle(self, deadline_s: float) -> str | None:
        """Return why this engine cannot be held now, or None where it can.

        It can where one call reaches all workers between the same two forward steps: so not where there are several
        data-parallel engines or pipeline stages, nor where forward steps are paused already.
        """
        ...

    def hold(self, update_id: str, deadline_s: float) -> None:
        """Have every worker call `Receiver.hold`; returns when all have gone on. Called in a thread of its own.

        Every token is of the version whose weights it was computed with, also where steps were on their way.

        Args:
            update_id: The update whose receivers let go.
            deadline_s: Limit of the call, and of each worker's stand.
        """
        ...


@runtime_checkable
class LoopControl(EngineControl, Protocol):
    """An EngineControl whose engine serves in an event loop of this process, which an update must not block."""

    def check_thread(self) -> None:
        """Do nothing where the calling thread may wait for this engine; asked before an update, in its own thread.

        Raises:
            ConfigError: The engine's event loop runs in it.
        """
        ...


@dataclass(frozen=True, slots=True)
class SourceRegion:
    """A piece of a parameter that a source's rank holds: parameter name and Box in its global index space."""

    name: str
    box: Box


@dataclass(frozen=True, slots=True)
class Slot:
    """One region's place: segment index, first byte, size."""

    region: SourceRegion
    segment: int
    begin: int
    num_bytes: int


@runtime_checkable
class WeightSource(Protocol):
    """Where weights come from, as one rank sees it: a checkpoint's files, a trainer's shards, named tensors.

    Call order, per version: 1. `metadata`, then `regions`: both may be others than before. 2. `read` for planned
    regions, from several threads at once. And `close` in the end.
    """

    def metadata(self) -> ParamTable:
        """Return all parameters of the model, equal on every rank. No transfer, no collective."""
        ...

    def regions(self) -> Sequence[SourceRegion]:
        """Return what this rank holds, replicas included, without gathering. Disjoint within a rank."""
        ...

    def read(self, region: SourceRegion, out: memoryview) -> None:
        """Write the region's elements into `out`, row-major in the metadata's dtype. Blocking; thread-safe.

        Args:
            region: One of `regions()`.
            out: Writable bytes, exactly the region's size; the caller's before and after.

        Raises:
            CheckpointError: The bytes cannot be had.
        """
        ...

    def close(self) -> None:
        """Release files and references."""
        ...


class DeviceReads(Protocol):
    """Reads of one step that GPUs make by themselves, beside what training has them do.

    Call order: 1. `submit`, once. 2. The source's `read`, of what that has left. 3. `wait`, inside the step's context;
    again before the segments are given up.
    """

    def submit(self, slots: Sequence[Slot], segments: Sequence[torch.Tensor], deadline_s: float) -> Sequence[Slot]:
        """Have GPUs copy into the segments what they hold; returns before that is done, with the slots left to `read`.

        Args:
            slots: Regions, and where they go.
            segments: Flat uint8 tensors; must stay alive until `wait` has returned, page-locked ones locked.
            deadline_s: Limit for what the host must wait for before the slots that are left are whole.

        Raises:
            TransferTimeoutError: Not within the deadline.
        """
        ...

    def wait(self, deadline_s: float) -> None:
        """Let training go on, its GPUs' next writes behind the reads, then wait until these are done.

        Raises:
            TransferTimeoutError: Not within the deadline; the segments are still being written to.
        """
        ...


@runtime_checkable
class SteppedSource(WeightSource, Protocol):
    """A source whose weights change while it is held: one rank of a trainer. Every rank counts the same steps.

    Call order, per update: 1. `metadata`, `regions`, `aliases`. 2. `offer` on the rank that leads, again while a rank
    has missed that step. 3. `at` on every rank; inside it what the plan uses is read: by GPUs where `at` gave
    DeviceReads, all else by `read`.
    """

    def aliases(self) -> Mapping[int, int]:
        """Return which of `regions()` are the same memory as an earlier one (tied parameters), and as which."""
        ...

    def offer(self, attempt: int) -> int:
        """Return the step to take next; a later one, with more room before it, the more attempts have failed."""
        ...

    def at(self, step: int, deadline_s: float) -> AbstractContextManager[DeviceReads | None]:
        """Return a context in which the weights are those of `step`: it waits for them, training waits for its end.

        Where weights lie on GPUs, the context is what reads them; None where the host reads all.

        Raises:
            StepMissedError: That step is past, will not come, or was overwritten while the context was open.
            TransferTimeoutError: It did not come within the deadline.
        """
        ...


@runtime_checkable
class Transport(Protocol):
    """A way to read a holder's segments. Lives in the process that receives.

    Call order: 1. `open` per segment. 2. `retain`. 3. `submit`, `wait`, many times; then from 1. 4. `close`.
    Only reads: nobody writes into a peer's memory. Blocks get their pages before they are read into, unless the class
    says that it makes them itself: `makes_pages = True`.
    """

    @property
    def name(self) -> str:
        """Name under which `headrace.transports` lists it."""
        ...

    def open(self, holder: HolderAddress, segment: SegmentDescriptor, deadline_s: float) -> None:
        """Make a segment readable; idempotent per `segment_id`.

        Raises:
            ConnectError: The holder cannot be reached or does not lend the segment.
        """
        ...

    def retain(self, segment_ids: Collection[str]) -> None:
        """Forget all other segments, and what is kept open to holders that have none left."""
        ...

    def submit(
        self, copies: CopyTable, segments: Sequence[SegmentDescriptor], blocks: Sequence[torch.Tensor]
    ) -> int:
        """Start copies from opened segments and return a job number; may return before they are done.

        Args:
            copies: `src_block` indexes `segments`, `dst_block` indexes `blocks`.
            segments: Opened before.
            blocks: Flat uint8 tensors that destination bytes are counted in; must stay alive until `wait` returns.
        """
        ...

    def wait(self, job: int, deadline_s: float) -> None:
        """Wait until a job's bytes are in place.

        Raises:
            TransferTimeoutError: Not within the deadline; the destination must not be reused for live data.
            PeerLostError: The holder died.
            TransportClosedError: `close` was called before.
        """
        ...

    def close(self) -> None:
        """Release every opened segment; idempotent."""
        ...
