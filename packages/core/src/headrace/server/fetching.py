"""Fetch: pieces of a version read from several holders at once, in rounds, until all are there."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from headrace.errors import HeadraceError, PeerLostError, TransferTimeoutError, UncoveredRegionError
from headrace.geometry import RegionTable
from headrace.manifest import Manifest
from headrace.planner.assignment import assign
from headrace.planner.copies import finish, make_copies
from headrace.planner.holdings import Holdings
from headrace.planner.join import join, restrict, uncovered, volumes
from headrace.protocols import Transport
from headrace.segments.ahead import PagesAhead
from headrace.server.whole import sums_of
from headrace.types import I32, I64, ITEMSIZES, U64, ParamTable

logger = logging.getLogger(__name__)
MIB = 1 << 20
GivenCallback = Callable[[Mapping[int, int], int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSettings:
    """How holders are read.

    Attributes:
        batch_bytes: Most bytes of one request; the unit that goes to another holder when one fails.
        lanes: Requests under way at each holder.
        open_s: Deadline for reaching a holder.
        patience_s: What a request may take beside its bytes.
        least_bytes_per_s: Slower than that a holder counts as hung.
        attempts: How often a parameter whose sum is wrong is read: first from all holders, then from one after another.
    """

    batch_bytes: int = 32 * MIB
    lanes: int = 3
    open_s: float = 10.0
    patience_s: float = 10.0
    least_bytes_per_s: float = 2e6
    attempts: int = 5


@dataclass(frozen=True, eq=False)
class _Batch:
    """Reads that belong together: rows of the pieces, and for every holder that has them where they lie there."""

    rows: I64
    sources: Mapping[int, RegionTable]
    num_bytes: int


@dataclass
class Pieces:
    """What is to be read: boxes, where they go, who gave what has arrived (-1: nobody yet), and its sums."""

    table: RegionTable
    num_bytes: I64
    giver: I32
    sums: U64

    @classmethod
    def of(cls, table: RegionTable, params: ParamTable) -> Self:
        """Nothing of it has arrived."""
        sums = np.zeros(len(table), np.uint64)
        return cls(table, _bytes_of(table, params), np.full(len(table), -1, np.int32), sums)

    def refine(self, rows: I64, parts: RegionTable, params: ParamTable) -> I64:
        """Put `parts` in the place of `rows`, which they cover; return their rows."""
        kept = np.delete(np.arange(len(self.table)), rows)
        self.table = RegionTable.concat([self.table.take(kept), parts])
        self.num_bytes = np.concatenate([self.num_bytes[kept], _bytes_of(parts, params)])
        self.giver = np.concatenate([self.giver[kept], np.full(len(parts), -1, np.int32)])
        self.sums = np.concatenate([self.sums[kept], np.zeros(len(parts), np.uint64)])
        return np.arange(len(kept), len(self.table))


def _bytes_of(table: RegionTable, params: ParamTable) -> I64:
    return np.asarray(volumes(table.shape) * ITEMSIZES[params.dtype_codes[table.param]])


@dataclass(frozen=True)
class Landing:
    """Where pieces go: flat blocks, and who makes their memory."""

    blocks: Sequence[torch.Tensor]
    memory: PagesAhead

    def prepare(self, table: RegionTable, num_bytes: I64) -> None:
        """Have the memory of dense regions made, as far as nobody began with it."""
        for block, begin, size in zip(
            table.block.tolist(), table.base.tolist(), num_bytes.tolist(), strict=True
        ):
            self.memory.need(block, begin, begin + size)


@dataclass(frozen=True)
class _Work:
    """One call of `run`."""

    pieces: Pieces
    landing: Landing
    limit: float
    total_bytes: int


class Fetch:
    """Reads pieces of one version from its holders. Used by one thread, works in several.

    Args:
        manifests: Who holds what.
        params: The version's parameters, in whose ids pieces are.
        way: Returns the transport for a holder; called once per holder.
        settings: Sizes and deadlines.
        told: Called after each batch with the bytes that each holder gave, by index, and the bytes in all.

    Attributes:
        lost: Holders that are not asked any more, and why.
        prefer: Holders that are asked alone, where they have everything that is wanted; empty for all.
        reach_s: Seconds that reaching holders took.
        read_s: Seconds of reading.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        params: ParamTable,
        way: Callable[[Manifest], Transport],
        settings: ReadSettings,
        told: GivenCallback,
    ) -> None:
        self._manifests = manifests
        self._params = params
        self._find_way = way
        self._settings = settings
        self._told = told
        self.lost: dict[int, HeadraceError] = {}
        self.prefer: list[int] = []
        self.reach_s = self.read_s = 0.0
        self._ways: dict[int, Transport] = {}
        self._opening = [threading.Lock() for _ in manifests]
        self._lock = threading.Lock()
        self._given: dict[int, int] = {}
        self._queues: dict[int, deque[_Batch]] = {}

    def batch_bytes(self, total_bytes: int) -> int:
        """Return a size at which every holder is asked several times."""
        share = total_bytes // (4 * self._settings.lanes * max(len(self._manifests), 1))
        return max(min(self._settings.batch_bytes, share), min(MIB, self._settings.batch_bytes))

    def run(self, pieces: Pieces, landing: Landing, limit: float) -> None:
        """Read what nobody gave yet, in rounds: after each, what lost holders owed is asked of others. Blocking.

        Args:
            pieces: What is wanted; finer afterwards where holders have only parts of a piece.
            landing: Memory that the pieces lie in.
            limit: When to give up, monotonic.

        Raises:
            PeerLostError: Holders were lost, and nobody else has what they owed.
            UncoveredRegionError: The holders never had everything.
            TransferTimeoutError: The limit has passed.
        """
        total = int(pieces.num_bytes.sum())
        while len(todo := np.flatnonzero(pieces.giver < 0)):
            if time.monotonic() >= limit:
                text = f"{len(todo)} pieces of {len(pieces.giver)} were not read within the deadline"
                raise TransferTimeoutError(text, phase="join")
            begin = time.monotonic()
            alive = self._reach()
            self.reach_s += time.monotonic() - begin
            preferred = [i for i in self.prefer if i in alive]
            queues = self._plan(pieces, todo, preferred, total) or self._plan(pieces, todo, alive, total)
            if queues is None:
                raise self._nobody(pieces, todo)
            self._queues = queues
            begin = time.monotonic()
            self._round(_Work(pieces, landing, limit, total))
            self.read_s += time.monotonic() - begin

    def _reach(self) -> list[int]:
        """Return the holders that can be reached, all of them tried side by side."""
        left = [i for i in range(len(self._manifests)) if i not in self.lost]
        if left:
            with ThreadPoolExecutor(len(left), "headrace-reach") as pool:
                errors = pool.map(self._try, left)
            self.lost |= {i: error for i, error in zip(left, errors, strict=True) if error is not None}
        return [i for i in left if i not in self.lost]

    def _try(self, holder: int) -> HeadraceError | None:
        try:
            self._way(holder)
        except HeadraceError as error:
            logger.warning("holder %s cannot be reached: %s", self._name(holder), error)
            return error
        return None

    def _nobody(self, pieces: Pieces, todo: I64) -> HeadraceError:
        names = sorted({self._params[int(i)].name for i in np.unique(pieces.table.param[todo])[:3]})
        what = f"{len(todo)} pieces are held by nobody any more, such as of {', '.join(names)}"
        if not self.lost:
            return UncoveredRegionError(what, phase="join", name=names[0])
        why = "; ".join(f"{self._name(i)}: {error}" for i, error in self.lost.items())
        return PeerLostError(f"{what}; holders were lost: {why}", phase="join", name=names[0], retryable=True)

    def _name(self, holder: int) -> str:
        return self._manifests[holder].holder.holder_id

    def _plan(
        self, pieces: Pieces, todo: I64, alive: Sequence[int], total_bytes: int
    ) -> dict[int, deque[_Batch]] | None:
        """Return batches per holder, or None where these holders do not have everything."""
        if not alive:
            return None
        needs = pieces.table.take(todo)
        holdings = Holdings.of([self._manifests[i] for i in alive], self._params, 0)
        pairs = join(needs, holdings.boxes)
        if len(uncovered(needs, pairs)):
            return None
        todo = pieces.refine(todo, restrict(needs, pairs.need, pairs.offsets, pairs.shape), self._params)
        rows = holdings.rows_by_holder(pairs.box)
        sets, inverse = np.unique(rows >= 0, axis=0, return_inverse=True)
        group = np.asarray(inverse.reshape(-1), np.int32)
        candidates = [np.flatnonzero(one) for one in sets]
        sizes = pieces.num_bytes[todo]
        giver = assign(sizes, group, candidates, np.ones(len(alive))).giver
        starts = np.cumsum([0, *(len(self._manifests[i].segments) for i in alive)]).astype(np.int32)
        queues: dict[int, deque[_Batch]] = {i: deque() for i in alive}
        for first, last in _runs(giver, group, sizes, self.batch_bytes(total_bytes)):
            part = slice(first, last)
            sources = {}
            for near in candidates[int(group[first])].tolist():
                table = restrict(holdings.regions, rows[part, near], pairs.offsets[part], pairs.shape[part])
                sources[alive[near]] = replace(table, block=table.block - starts[near])
            queues[alive[int(giver[first])]].append(_Batch(todo[part], sources, int(sizes[part].sum())))
        return queues

    def _round(self, work: _Work) -> None:
        """Work the queues off, a few lanes per holder; whoever is done takes over from the longest queue."""
        lanes = [i for i in self._queues for _ in range(self._settings.lanes)]
        with ThreadPoolExecutor(len(lanes), "headrace-read") as pool:
            for future in [pool.submit(self._lane, i, work) for i in lanes]:
                future.result()

    def _lane(self, holder: int, work: _Work) -> None:
        while (batch := self._next(holder, work)) is not None:
            try:
                self._read(holder, batch, work)
            except HeadraceError as error:
                with self._lock:
                    self._queues[holder].appendleft(batch)
                    known = self.lost.setdefault(holder, error)
                if known is error:
                    logger.warning("holder %s is not asked any more: %s", self._name(holder), error)
            else:
                # Outside: what is told may break the reading off, which is no fault of the holder.
                with self._lock:
                    self._told(self._given, work.total_bytes)

    def _next(self, holder: int, work: _Work) -> _Batch | None:
        with self._lock:
            if holder in self.lost or time.monotonic() >= work.limit:
                return None
            if self._queues[holder]:
                return self._queues[holder].popleft()
            for queue in sorted(self._queues.values(), key=len, reverse=True):
                for batch in reversed(queue):
                    if holder in batch.sources:
                        queue.remove(batch)
                        return batch
            return None

    def _read(self, holder: int, batch: _Batch, work: _Work) -> None:
        """Read one batch from one holder, and sum it up while it is in the CPU's cache and others are on their way.

        Raises:
            TransportError: The holder broke or was too slow.
        """
        way, settings, pieces = self._way(holder), self._settings, work.pieces
        codes = self._params.dtype_codes[pieces.table.param[batch.rows]]
        wanted = pieces.table.take(batch.rows)
        if not getattr(way, "makes_pages", False):
            work.landing.prepare(wanted, pieces.num_bytes[batch.rows])
        copies = make_copies(batch.sources[holder], wanted, codes, codes)
        copies, _ = finish(copies, np.zeros(len(copies), np.int64), 1)
        patience_s = settings.patience_s + batch.num_bytes / settings.least_bytes_per_s
        deadline_s = max(0.0, min(work.limit - time.monotonic(), patience_s))
        way.wait(way.submit(copies, self._manifests[holder].segments, work.landing.blocks), deadline_s)
        sums = sums_of(self._params, wanted, work.landing.blocks)
        with self._lock:
            pieces.giver[batch.rows], pieces.sums[batch.rows] = holder, sums
            self._given[holder] = self._given.get(holder, 0) + batch.num_bytes

    def _way(self, holder: int) -> Transport:
        """Return the transport to a holder, its segments open; each holder is reached once."""
        with self._opening[holder]:
            if holder not in self._ways:
                manifest = self._manifests[holder]
                way = self._find_way(manifest)
                for segment in manifest.segments:
                    way.open(manifest.holder, segment, self._settings.open_s)
                self._ways[holder] = way
            return self._ways[holder]


def _runs(giver: I32, group: I32, sizes: I64, limit_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield row ranges `[first, last)` with one giver and one group, of at most `limit_bytes` or one row."""
    first, filled = 0, 0
    for row in range(len(giver)):
        same = giver[row] == giver[first] and group[row] == group[first]
        if row > first and (not same or filled + sizes[row] > limit_bytes):
            yield first, row
            first, filled = row, 0
        filled += int(sizes[row])
    if len(giver):
        yield first, len(giver)
