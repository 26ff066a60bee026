"""Transports and backends that break on demand, at a chosen call."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from headrace.errors import PeerLostError, TransferTimeoutError, TransportClosedError
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.plan import CopyTable
from headrace.protocols import InferenceBackend, NamedTensors, Skeleton, Transport, WorkerIdentity

Action = Literal["fail", "corrupt", "delay", "hang"]
_HANG_S = 3600.0


class InjectedError(RuntimeError):
    """What a fault raises in a backend: a foreign exception, as an engine's own would be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong, where and when.

    Attributes:
        point: Where: `open`, `submit`, `wait` of a transport; `load`, `begin_reload`, `end_reload`, `enter` and
            `leave` (of the commit scope), `set_version` of a backend.
        action: `fail` raises; `corrupt` flips a bit of what was written; `delay` sleeps; `hang` never comes back,
            but for a deadline or `close`.
        call: First call of the point at which it happens, counted from 1 when the fault is armed.
        times: At how many calls in a row; 0 for ever.
        seconds: Length of a delay.
        name: Live tensor that `corrupt` spoils; empty takes the first.
    """

    point: str
    action: Action
    call: int = 1
    times: int = 1
    seconds: float = 0.5
    name: str = ""


class _Faults:
    """Counts calls and says which fault is due."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._lock = threading.Lock()
        self.closed = threading.Event()
        self.arm(*faults)

    def arm(self, *faults: Fault) -> None:
        with self._lock:
            self._armed = faults
            self._calls: Counter[str] = Counter()

    def due(self, point: str) -> list[Fault]:
        with self._lock:
            self._calls[point] += 1
            number = self._calls[point]
        return [
            fault
            for fault in self._armed
            if fault.point == point
            and number >= fault.call
            and (not fault.times or number < fault.call + fault.times)
        ]

    def sleep(self, fault: Fault, deadline_s: float = _HANG_S) -> None:
        """Wait as the fault says, at most until the deadline, and not beyond `close`."""
        seconds = _HANG_S if fault.action == "hang" else fault.seconds
        self.closed.wait(min(seconds, deadline_s))


class FaultyTransport:
    """A Transport over another that fails, corrupts, delays or hangs at chosen calls.

    Args:
        inner: Does the work.
        faults: What goes wrong.
    """

    def __init__(self, inner: Transport, *faults: Fault) -> None:
        self._inner = inner
        self._faults = _Faults(faults)
        self._jobs: dict[int, tuple[CopyTable, Sequence[torch.Tensor]]] = {}

    @property
    def name(self) -> str:
        """The inner transport's."""
        return self._inner.name

    def open(self, holder: HolderAddress, segment: SegmentDescriptor, deadline_s: float) -> None:
        """Open a segment."""
        for fault in self._faults.due("open"):
            self._break(fault, deadline_s)
        self._inner.open(holder, segment, deadline_s)

    def retain(self, segment_ids: Collection[str]) -> None:
        """Forget all other segments."""
        self._inner.retain(segment_ids)

    def submit(
        self, copies: CopyTable, segments: Sequence[SegmentDescriptor], blocks: Sequence[torch.Tensor]
    ) -> int:
        """Start copies."""
        for fault in self._faults.due("submit"):
            self._break(fault, _HANG_S)
        job = self._inner.submit(copies, segments, blocks)
        self._jobs[job] = (copies, blocks)
        return job

    def wait(self, job: int, deadline_s: float) -> None:
        """Wait for copies; `corrupt` flips a bit of the first row's first byte."""
        begin = time.monotonic()
        faults = self._faults.due("wait")
        for fault in faults:
            self._break(fault, deadline_s)
        self._inner.wait(job, max(0.0, deadline_s - (time.monotonic() - begin)))
        copies, blocks = self._jobs.pop(job)
        if len(copies) and any(fault.action == "corrupt" for fault in faults):
            with torch.inference_mode():
                blocks[int(copies.dst_block[0])][int(copies.dst_base[0])] ^= 1

    def close(self) -> None:
        """Close the inner transport and end every hang."""
        self._faults.closed.set()
        self._inner.close()

    def _break(self, fault: Fault, deadline_s: float) -> None:
        if fault.action == "fail":
            message = f"injected: {self.name} lost its holder in {fault.point}"
            raise PeerLostError(message, name=self.name)
        if fault.action in ("delay", "hang"):
            self._faults.sleep(fault, deadline_s)
        if self._faults.closed.is_set():
            message = f"{self.name} was closed"
            raise TransportClosedError(message, name=self.name)
        if fault.action == "hang":
            message = f"injected: {self.name} hung for {deadline_s:g} s in {fault.point}"
            raise TransferTimeoutError(message, name=self.name)


class LatencyTransport(FaultyTransport):
    """A Transport over another whose every job takes some time longer, as over a distant network.

    Args:
        inner: Does the work.
        latency_s: Time that every `wait` takes at least.
    """

    def __init__(self, inner: Transport, latency_s: float) -> None:
        super().__init__(inner, Fault(point="wait", action="delay", times=0, seconds=latency_s))


class FaultyBackend:
    """An InferenceBackend over another that raises, sleeps or spoils a live tensor at chosen points.

    Args:
        inner: The engine worker.
        faults: What goes wrong; `arm` exchanges them.
    """

    def __init__(self, inner: InferenceBackend, *faults: Fault) -> None:
        self.inner = inner
        self._faults = _Faults(faults)

    def arm(self, *faults: Fault) -> None:
        """Replace what goes wrong and count calls anew; without arguments all is well again."""
        self._faults.arm(*faults)

    def identity(self) -> WorkerIdentity:
        """The inner backend's."""
        return self.inner.identity()

    def live_tensors(self) -> Mapping[str, torch.Tensor]:
        """The inner backend's."""
        return self.inner.live_tensors()

    def skeleton(self) -> Skeleton | None:
        """The inner backend's."""
        return self.inner.skeleton()

    def loaded_from(self) -> str | None:
        """The inner backend's."""
        return self.inner.loaded_from()

    def load(self, pairs: NamedTensors) -> None:
        """Load, after or before something went wrong."""
        with self._around("load"):
            self.inner.load(pairs)

    def begin_reload(self) -> None:
        """Enter the life cycle."""
        with self._around("begin_reload"):
            self.inner.begin_reload()

    def end_reload(self) -> None:
        """Leave the life cycle."""
        with self._around("end_reload"):
            self.inner.end_reload()

    def reload_unit(self, name: str) -> str:
        """The inner backend's."""
        return self.inner.reload_unit(name)

    def optional(self, name: str) -> bool:
        """The inner backend's."""
        return self.inner.optional(name)

    def derived(self) -> Mapping[str, Sequence[str]]:
        """The inner backend's."""
        return self.inner.derived()

    def rederive(self, names: Sequence[str]) -> bool:
        """The inner backend's."""
        return self.inner.rederive(names)

    def free_memory_bytes(self) -> int:
        """The inner backend's."""
        return self.inner.free_memory_bytes()

    @contextmanager
    def commit_scope(self) -> Iterator[None]:
        """The inner scope; `enter` faults come inside before any write, `leave` faults after the last."""
        with self.inner.commit_scope():
            self._act("enter")
            yield
            self._act("leave")

    def set_version(self, version: int) -> None:
        """Set the version."""
        with self._around("set_version"):
            self.inner.set_version(version)

    @contextmanager
    def _around(self, point: str) -> Iterator[None]:
        faults = self._faults.due(point)
        for fault in faults:
            if fault.action != "corrupt":
                self._break(fault)
        yield
        for fault in faults:
            if fault.action == "corrupt":
                self._break(fault)

    def _act(self, point: str) -> None:
        for fault in self._faults.due(point):
            self._break(fault)

    def _break(self, fault: Fault) -> None:
        if fault.action == "fail":
            message = f"injected failure in {fault.point}"
            raise InjectedError(message)
        if fault.action == "corrupt":
            spoil(self.inner, fault.name)
        else:
            self._faults.sleep(fault)


def spoil(backend: InferenceBackend, name: str = "") -> str:
    """Flip a bit of the first element of a live tensor (the first one, if none is named); returns its name."""
    live = backend.live_tensors()
    chosen = name or next(iter(live))
    with torch.no_grad():
        first = live[chosen].detach().as_strided((1,), (1,))
        first.view(torch.uint8)[:1].bitwise_xor_(1)
    return chosen


def arm(backend: Any, _receiver: Any, *faults: Fault) -> None:  # noqa: ANN401 - a FaultyBackend in a worker
    """Arm faults in a worker; for `BareEngine.call`."""
    backend.arm(*faults)
