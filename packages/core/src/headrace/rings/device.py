"""DeviceRing: slots in a GPU's memory, filled over PCIe and broadcast by NCCL; receivers open them by CUDA IPC."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from secrets import token_hex

import torch

from headrace.errors import PeerLostError, TransferTimeoutError
from headrace.manifest import SegmentDescriptor
from headrace.pipeline import PipelineStage, RingSignals, signal_bytes
from headrace.rings.cast import Cast
from headrace.rings.cpus import cpus_beside, keep_to
from headrace.segments.cuda import OwnedCudaSegment, gpu_of
from headrace.segments.cudart import cuda_runtime
from headrace.segments.host import HostSegment
from headrace.segments.lending import Lender
from headrace.segments.pinning import PinnedRange
from headrace.transports.binding import Program, bind_copies
from headrace.transports.collective import BroadcastGroup

logger = logging.getLogger(__name__)
LEAVE_S = 5.0
_POLL_S = 20e-6
_KEPT_SETS = 2
"""Versions alternate between two sets of segments: copies bound to both stay, and so does their page-locking."""


class Pins:
    """Page-locked segments of a holder, locked once and kept over updates. Used by one thread at a time."""

    def __init__(self) -> None:
        self._pinned: dict[str, tuple[torch.Tensor, PinnedRange | None]] = {}
        self._recent: deque[frozenset[str]] = deque(maxlen=_KEPT_SETS)

    def hold(self, segments: list[HostSegment]) -> None:
        """Page-lock what is not yet; let go of what neither this call nor the one before named.

        No copy may be reading anything else.

        Raises:
            CapacityError: A limit on locked memory.
        """
        self._recent.append(frozenset(segment.descriptor.segment_id for segment in segments))
        for gone in self._pinned.keys() - frozenset().union(*self._recent):
            self._let_go(gone)
        for segment in segments:
            key, tensor = segment.descriptor.segment_id, segment.tensor
            if key not in self._pinned:
                # The range does not keep the mapping, which must not end before it: the tensor does.
                self._pinned[key] = (tensor, _pin(tensor))

    def close(self) -> None:
        """Unlock everything; idempotent. No copy may be reading it any more."""
        for key in list(self._pinned):
            self._let_go(key)

    def _let_go(self, key: str) -> None:
        pinned = self._pinned.pop(key)[1]
        if pinned is not None:
            pinned.close()


def _pin(tensor: torch.Tensor) -> PinnedRange | None:
    """Page-lock a segment, unless its store has; chunk by chunk, which is what copy programs reckon with."""
    if tensor.is_pinned():
        return None
    return PinnedRange(tensor.data_ptr(), tensor.nbytes, writable=True)


class DeviceRing:
    """Slots on one GPU and signals in host memory.

    What orders the accesses to slot `b % depth` for bucket `b`, on every member by itself:

    1. `fill` of an own bucket begins when the pipeline has released bucket `b - depth`: all receivers have said that
       they applied it, which each says after the event that follows its copy out of the slot.
    2. The broadcast is enqueued when the pipeline has passed `fill` of `b`, which waits for the same release. On the
       member that fills, host and stream also wait for the event that follows the fill's copies. On the others it is
       the first to write into the slot, so what 1. says of filling holds for it; they wait for the word of the one that
       fills, so that no kernel occupies a GPU while there is nothing to broadcast.
    3. Receivers are told when the event that follows the broadcast was seen by the host and the group was not left
       meanwhile; their copies come after.

    `fill` does not wait for its copies: the next fill is enqueued behind them, so the link never idles. Nothing waits
    for a whole device, and members wait only for the one that fills the bucket, and inside its broadcast.

    Args:
        device_uuid: The GPU, as torch names it.
        num_bytes: Size of all slots.
        num_receivers: Workers that take from them.
        lender: Lends the signals.
        pins: The holder's page-locked segments.

    Raises:
        BackendUnavailableError: This process does not see the GPU.
        ConfigError: The GPU's memory cannot be lent.
        CapacityError: The GPU has no room.
    """

    def __init__(
        self, device_uuid: str, num_bytes: int, num_receivers: int, lender: Lender, pins: Pins
    ) -> None:
        self.key = (device_uuid, num_bytes, num_receivers)
        self.device: torch.device | None = gpu_of(device_uuid)
        self._gpu = self.device
        self._lender = lender
        self._pins = pins
        self._slots: OwnedCudaSegment | None = OwnedCudaSegment(num_bytes, self._gpu, token_hex(16))
        self._descriptor = self._slots.descriptor
        self._signals = HostSegment(signal_bytes(num_receivers), "headrace-signals", peers_write=True)
        self.words = RingSignals(self._signals.tensor)
        lender.lend(self._signals)
        # Apart from the streams of copy programs, which torch takes from the pool of normal priority.
        self._filling, self._sending = _stream(self._gpu), _stream(self._gpu)
        self._bound: OrderedDict[str, dict[int, Program]] = OrderedDict()
        self._cpus = cpus_beside(cuda_runtime().pci_address(self._gpu.index))

    @property
    def descriptors(self) -> tuple[SegmentDescriptor, SegmentDescriptor]:
        """What receivers open."""
        return self._descriptor, self._signals.descriptor

    def prepare(self, cast: Cast) -> None:
        """Page-lock what is filled from, and bind the copies into slots; kept while they stay the same.

        Raises:
            CapacityError: A limit on locked memory.
        """
        with torch.cuda.device(self._gpu):
            self._pins.hold(cast.used)
            if cast.fill_key not in self._bound:
                own = filter(cast.is_mine, range(len(cast.plan.bucket_owner)))
                self._bound[cast.fill_key] = {bucket: self._bind(cast, bucket) for bucket in own}
            self._bound.move_to_end(cast.fill_key)
            while len(self._bound) > _KEPT_SETS:
                self._bound.popitem(last=False)

    def _bind(self, cast: Cast, bucket: int) -> Program:
        slot = self._slot(cast, bucket % cast.plan.ring.depth, cast.plan.ring.slot_bytes)
        return bind_copies(cast.fill(bucket), cast.blocks, [slot])

    def _slot(self, cast: Cast, slot: int, num_bytes: int) -> torch.Tensor:
        if self._slots is None:
            raise PeerLostError("the ring was closed", phase="broadcast")
        begin = slot * cast.plan.ring.slot_bytes
        return self._slots.tensor[begin : begin + num_bytes]

    def stages(self, cast: Cast, group: BroadcastGroup) -> list[PipelineStage]:
        """Return `fill`, which enqueues, and `broadcast`, which waits and tells receivers."""
        programs = self._bound[cast.fill_key]
        group.begin()
        filled: dict[int, torch.cuda.Event] = {}
        buffers = [
            self._slot(cast, bucket % cast.plan.ring.depth, int(size))
            for bucket, size in enumerate(cast.plan.bucket_bytes.tolist())
        ]

        def fill(bucket: int, _slot: int) -> None:
            self._settle_thread(bucket)
            if bucket in programs:
                with self._on(self._filling):
                    programs[bucket].run()
                    filled[bucket] = self._filling.record_event()

        def send(bucket: int, _slot: int) -> None:
            self._settle_thread(bucket)
            with self._on(self._sending):
                if bucket in filled:
                    full = filled.pop(bucket)
                    wait_for(full, cast.deadline_s, cast.alive, f"bucket {bucket} to be filled")
                    self._sending.wait_event(full)
                group.meet(cast.root(bucket), cast.deadline_s, cast.alive)
                group.broadcast(buffers[bucket], cast.root(bucket))
                sent = self._sending.record_event()
                wait_for(sent, cast.deadline_s, cast.alive, f"the broadcast of bucket {bucket}")
            # An aborted broadcast ends too, with anything in the slot; but first the holder is told to stop.
            cast.alive()
            self.words.announce(bucket + 1)

        return [PipelineStage("fill", fill), PipelineStage("broadcast", send)]

    def _settle_thread(self, bucket: int) -> None:
        if bucket == 0:
            keep_to(self._cpus)

    @contextmanager
    def _on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Make a stream the thread's current one; what CUDA says is wrong breaks the broadcast."""
        try:
            with torch.inference_mode(), torch.cuda.device(self._gpu), torch.cuda.stream(stream):
                yield
        except RuntimeError as error:
            message = f"{self._gpu} failed in the broadcast: {error}"
            raise PeerLostError(message, phase="broadcast") from error

    def close(self) -> None:
        """Release both; idempotent. The group must have been left, where it may be inside a broadcast."""
        self.words.cancel()
        self._lender.withdraw(self._signals.descriptor.segment_id)
        self._signals.close()
        slots, self._slots = self._slots, None
        if slots is None:
            return
        if self._is_idle():
            self._bound.clear()
            slots.close()
        else:
            logger.warning(
                "%s is still at work on a ring that is over; its memory ends with this process", self._gpu
            )

    def _is_idle(self) -> bool:
        """Wait until nothing reads segments or writes slots any more; False where that does not come."""
        try:
            for stream in (self._filling, self._sending):
                with self._on(stream):
                    wait_for(stream.record_event(), LEAVE_S, lambda: None, "the ring to come to rest")
        except (PeerLostError, TransferTimeoutError) as error:
            logger.info("ring on %s: %s", self._gpu, error)
            return False
        return True


def wait_for(event: torch.cuda.Event, deadline_s: float, alive: Callable[[], None], what: str) -> None:
    """Wait until an event has passed.

    Raises:
        TransferTimeoutError: Not within the deadline.
        HeadraceError: What `alive` raised.
    """
    limit = time.monotonic() + deadline_s
    while not bool(event.query()):  # type: ignore[no-untyped-call]
        alive()
        if time.monotonic() > limit:
            message = f"waited {deadline_s:.1f} s for {what}"
            raise TransferTimeoutError(message, phase="broadcast")
        time.sleep(_POLL_S)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
