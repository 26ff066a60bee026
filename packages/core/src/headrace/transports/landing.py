"""Where host memory's bytes land: in segments without pages yet through their descriptor, elsewhere by copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headrace.plan import CopyTable
from headrace.segments.host import unsealed
from headrace.transports.binding import bind_copies
from headrace.transports.rows import Mask, Rows

_COPY_S = 60.0


def land(copies: CopyTable, sources: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor]) -> None:
    """Copy rows from flat blocks of host memory to where they belong. Blocking.

    Args:
        copies: Rows that were checked to lie in their memory, see `real_copies`.
        sources: Flat uint8 blocks.
        blocks: Where rows go.

    Raises:
        CapacityError: There is no memory for a page.
    """
    fresh = {i: unsealed(blocks[i]) for i in np.unique(copies.dst_block).tolist()}
    written = _dense(copies) & np.isin(copies.dst_block, [i for i, segment in fresh.items() if segment])
    rows = copies.take(written)
    memory = [source.numpy().data for source in sources] if len(rows) else []
    columns = (rows.dst_block, rows.dst_base, rows.src_block, rows.src_base, Rows.sources(rows).num_bytes)
    for block, begin, source, base, size in zip(*(column.tolist() for column in columns), strict=True):
        segment = fresh[block]
        assert segment is not None
        segment.write(begin, memory[source][base : base + size])
    if not written.all():
        program = bind_copies(copies.take(~written), sources, blocks)
        program.run()
        program.finish(_COPY_S)


def _dense(copies: CopyTable) -> Mask:
    """Return whether a row is the same bytes in one run at both ends, shape (N,)."""
    same = copies.src_dtype == copies.dst_dtype
    return np.asarray(same & Rows.sources(copies).dense & Rows.destinations(copies).dense)
