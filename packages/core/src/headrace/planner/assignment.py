"""Who reads what from whom: reads spread over links so that the slowest link finishes early. Pure integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.errors import PlanError
from headrace.types import I32, I64

F64 = npt.NDArray[np.float64]
_MOST_ROUNDS = 200
_CLOSE = 1e-4
_MANY = 1 << 16
_MOST_MOVES = 32


@dataclass(frozen=True)
class Assignment:
    """Which link gives each read, and how far that is from the best possible.

    Attributes:
        giver: Link that gives each read, shape (N,).
        seconds: When the slowest link is done.
        bound_s: No assignment can be done earlier.
    """

    giver: I32
    seconds: float
    bound_s: float

    @property
    def distance(self) -> float:
        """How much longer than the bound, as a fraction."""
        return self.seconds / self.bound_s - 1 if self.bound_s else 0.0


def assign(num_bytes: I64, group: I32, candidates: Sequence[I64], rates: F64) -> Assignment:
    """Choose a giver for every read. Deterministic.

    First bytes are poured into links as if they were water, group by group until nothing moves any more; that is
    the optimum of the problem without whole reads. Then reads are dealt out in runs, so that each giver is read in
    sequence.

    Args:
        num_bytes: Size of each read, shape (N,).
        group: Group of each read: reads of one group can be given by the same links; shape (N,).
        candidates: Per group, the links that can give it.
        rates: Bytes per second of each link, shape (L,).

    Raises:
        PlanError: A group has no candidate, or a rate is not positive.
    """
    if (rates <= 0).any():
        raise PlanError("every link needs a rate above 0; leave out links that are down")
    totals = np.bincount(group, num_bytes, len(candidates)).astype(np.float64)
    empty = [i for i, links in enumerate(candidates) if not len(links) and totals[i]]
    if empty:
        raise PlanError(f"nobody can give {len(empty)} groups of reads, the first is {empty[0]}")
    poured = _pour(totals, candidates, rates)
    giver = _deal(num_bytes, group, candidates, poured, rates)
    loads = np.bincount(giver, num_bytes, len(rates)) / rates
    return Assignment(giver, float(loads.max(initial=0.0)), _bound(totals, candidates, rates, poured))


def _pour(totals: F64, candidates: Sequence[I64], rates: F64) -> list[F64]:
    """Return the bytes that each candidate of each group gives: balanced by turns until loads stay the same."""
    loads = np.zeros(len(rates))
    poured = [np.zeros(len(links)) for links in candidates]
    order = np.argsort([len(links) for links in candidates], kind="stable").tolist()
    for _ in range(_MOST_ROUNDS):
        moved = 0.0
        for i in order:
            if not totals[i]:
                continue
            links = candidates[i]
            loads[links] -= poured[i]
            shares = _fill(loads[links], rates[links], float(totals[i]))
            moved += float(np.abs(shares - poured[i]).sum())
            poured[i] = shares
            loads[links] += shares
        if moved <= _CLOSE * totals.sum():
            break
    return poured


def _fill(loads: F64, rates: F64, amount: float) -> F64:
    """Return what each link gets of `amount` so that all that get something end at the same time."""
    ends = loads / rates
    order = np.argsort(ends, kind="stable")
    rate, level = np.cumsum(rates[order]), ends[order]
    room = level * rate - np.cumsum(loads[order])
    used = max(int(np.searchsorted(room, amount, side="right")), 1)
    time_s = (amount + loads[order][:used].sum()) / rate[used - 1]
    return np.asarray(np.maximum(time_s * rates - loads, 0.0), np.float64)


def _deal(num_bytes: I64, group: I32, candidates: Sequence[I64], poured: Sequence[F64], rates: F64) -> I32:
    """Return the link of each read: runs as long as what was poured, then the rests evened out."""
    giver = np.zeros(len(num_bytes), np.int32)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(candidates) + 1))
    for i, links in enumerate(candidates):
        rows = order[starts[i] : starts[i + 1]]
        if len(rows):
            sizes = num_bytes[rows].astype(np.float64)
            edges = np.cumsum(poured[i])
            middle = np.cumsum(sizes) - sizes / 2
            giver[rows] = links[np.minimum(np.searchsorted(edges[:-1], middle, side="right"), len(links) - 1)]
    return _even_out(giver, num_bytes, group, candidates, rates)


def _even_out(giver: I32, num_bytes: I64, group: I32, candidates: Sequence[I64], rates: F64) -> I32:
    """Move single reads from the link that ends last to one that ends earlier, as long as that helps."""
    loads = np.bincount(giver, num_bytes, len(rates)).astype(np.float64)
    for _ in range(_MOST_MOVES if len(giver) > _MANY else 4 * len(rates)):
        worst = int(np.argmax(loads / rates))
        end = loads[worst] / rates[worst]
        rows = np.flatnonzero(giver == worst)
        best: tuple[float, int, int] | None = None
        for row in rows[np.argsort(num_bytes[rows], kind="stable")][:64].tolist():
            links = candidates[int(group[row])]
            ends = (loads[links] + num_bytes[row]) / rates[links]
            to = int(np.argmin(ends))
            if ends[to] < end and (best is None or ends[to] < best[0]):
                best = (float(ends[to]), row, int(links[to]))
        if best is None:
            return giver
        _, row, link = best
        loads[worst] -= num_bytes[row]
        loads[link] += num_bytes[row]
        giver[row] = link
    return giver


def _bound(totals: F64, candidates: Sequence[I64], rates: F64, poured: Sequence[F64]) -> float:
    """Return a time that no assignment beats: some set of links must give all that only its links can give.

    Every set gives a valid bound; the sets of the links that end last in the poured optimum give the tightest.
    """
    loads = np.zeros(len(rates))
    for links, shares in zip(candidates, poured, strict=True):
        loads[links] += shares
    ends = loads / rates
    slowest = [float(ends[links].min()) if len(links) else np.inf for links in candidates]
    levels = np.unique(np.round(ends, 9))[::-1][:64]
    best = 0.0
    for level in [*levels.tolist(), 0.0]:
        slack = level * (1 - 1e-3)
        only = sum(float(t) for t, low in zip(totals, slowest, strict=True) if low >= slack)
        rate = float(rates[ends >= slack].sum())
        best = max(best, only / rate if rate else 0.0)
    return best
