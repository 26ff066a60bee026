"""PeerSource: a version that other hosts hold, read from all of its holders at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from headrace.errors import IntegrityError, LocalProtocolError
from headrace.geometry import Box, RegionTable
from headrace.manifest import Manifest
from headrace.planner.join import volumes
from headrace.planner.ring import cut
from headrace.protocols import SourceRegion, Transport
from headrace.segments.ahead import PagesAhead
from headrace.server.fetching import Fetch, Landing, Pieces, ReadSettings
from headrace.server.whole import params_of, whole_regions
from headrace.types import I64, ITEMSIZES, ParamTable
from headrace.wire import Offer

logger = logging.getLogger(__name__)
TellCallback = Callable[[Mapping[str, int], int], None]


class PeerSource:
    """One version, as a WeightSource whose holders are elsewhere. Lives in the joiner; only reads.

    Reads are spread over all holders. A holder that breaks or hangs is left out, and what it still owed is read from
    others; who is done early takes over from who is late. Sums are made of what has come while the rest is on its way;
    at the end every parameter's is compared with what the holders said, and what differs is read again from others.

    Args:
        offer: Who holds what, and the sums.
        way: Returns the transport for a holder; called once per holder, the transports stay the caller's.
        settings: Sizes and deadlines.
        told: Called now and then with the bytes that each holder gave, by name, and the bytes in all.

    Attributes:
        seconds: What `fill` took: `reach` holders, `read` from them and sum it up.
    """

    def __init__(
        self,
        offer: Offer,
        way: Callable[[Manifest], Transport],
        settings: ReadSettings | None = None,
        told: TellCallback | None = None,
    ) -> None:
        self.version = offer.version
        self._manifests = offer.manifests
        self._sums = offer.sums
        self._params = params_of(offer.manifests)
        if len(offer.sums) != len(self._params):
            text = f"version {offer.version} has {len(self._params)} parameters and {len(offer.sums)} sums"
            raise LocalProtocolError(text, phase="join", weight_version=offer.version)
        self._way = way
        self._settings = settings or ReadSettings()
        self._told = told or (lambda _given, _total: None)
        self._given: dict[str, int] = {}
        self.seconds: Mapping[str, float] = {}

    @property
    def given(self) -> Mapping[str, int]:
        """Bytes that each holder gave so far, by its name."""
        return dict(self._given)

    def metadata(self) -> ParamTable:
        """Return the version's parameters."""
        return self._params

    def regions(self) -> Sequence[SourceRegion]:
        """Return every parameter, whole."""
        return [SourceRegion(meta.name, Box.whole(meta.shape)) for meta in self._params]

    def read(self, region: SourceRegion, out: memoryview) -> None:
        """Read one parameter; `fill` is the way to read many."""
        index = self._params.index_of(region.name)
        if index is None:
            raise LocalProtocolError(
                f"version {self.version} has no parameter {region.name}", name=region.name
            )
        row = whole_regions(self._params).take(np.array([index]))
        row = RegionTable(row.param, row.offsets, row.shape, np.zeros(1, np.int32), row.base, row.strides)
        self.fill(
            row, [torch.frombuffer(out, dtype=torch.uint8)], lambda _done, _total: None, self._settings.open_s
        )

    def fill(
        self,
        regions: RegionTable,
        blocks: Sequence[torch.Tensor],
        progress: Callable[[int, int], None],
        deadline_s: float,
    ) -> None:
        """Read regions to where they lie in `blocks`, and check their sums. Blocking.

        Raises:
            PeerLostError: Holders were lost, and nobody else has what they owed; says who and what.
            IntegrityError: A parameter's sum stays wrong, whoever gives it.
            TransferTimeoutError: It took too long.
        """
        limit = time.monotonic() + deadline_s
        real = regions.take(np.flatnonzero(volumes(regions.shape) > 0))
        sizes = ITEMSIZES[self._params.dtype_codes[real.param]]
        total = int((volumes(real.shape) * sizes).sum())
        fetch = Fetch(self._manifests, self._params, self._way, self._settings, self._teller(progress))
        table, _ = cut(real, sizes, fetch.batch_bytes(total))
        pieces, wrong = Pieces.of(table, self._params), np.zeros(0, np.int64)
        order = list(range(len(self._manifests)))
        for attempt in range(self._settings.attempts):
            with PagesAhead(blocks, at_once=False) as memory:
                fetch.run(pieces, Landing(blocks, memory), limit)
            self.seconds = {"reach": fetch.reach_s, "read": fetch.read_s}
            wrong = self._wrong(pieces)
            if not len(wrong):
                return
            bad = np.isin(pieces.table.param, wrong)
            if attempt == 0:
                given = np.bincount(pieces.giver[bad], minlength=len(self._manifests))
                order = np.argsort(given, kind="stable").tolist()
            fetch.prefer = [order[attempt % len(order)]]
            logger.warning("%d parameters have wrong sums and are read again, from one holder", len(wrong))
            pieces.giver[bad] = -1
        names = [self._params[int(i)].name for i in wrong[:5]]
        text = f"{len(wrong)} parameters differ from what their holders said, whoever gives them: {', '.join(names)}"
        raise IntegrityError(text, name=names[0], phase="join", weight_version=self.version)

    def _teller(self, progress: Callable[[int, int], None]) -> Callable[[Mapping[int, int], int], None]:
        def told(given: Mapping[int, int], total_bytes: int) -> None:
            self._given = {self._manifests[i].holder.holder_id: n for i, n in given.items()}
            progress(min(sum(given.values()), total_bytes), total_bytes)
            self._told(self._given, total_bytes)

        return told

    def close(self) -> None:
        """Nothing to release."""

    def _wrong(self, pieces: Pieces) -> I64:
        found = np.zeros(len(self._params), np.uint64)
        np.add.at(found, pieces.table.param, pieces.sums)
        asked = np.unique(pieces.table.param)
        return np.asarray(asked[found[asked] != self._sums[asked]], np.int64)
