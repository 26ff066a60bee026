"""Constants of the loader: written where they do not stand, left alone where they do."""

from __future__ import annotations

import numpy as np
import torch

from headrace.receiver.blocks import unmet_fills, write_fills
from headrace.recipe import FillTable


def test_only_what_does_not_stand_is_written() -> None:
    """The last columns of one tensor and the last rows of another, which is itself a part of a larger one."""
    first, second = torch.ones(4, 6), torch.ones(10, 2)[1:9]
    fills = FillTable(
        block=np.array([0, 1], np.int32),
        base=np.array([4, 12]),
        shape=np.array([[4, 2], [2, 2]]),
        strides=np.array([[6, 1], [2, 1]]),
        value=np.array([0.0, 0.5]),
    )
    targets = [first, second]
    assert len(unmet_fills(fills, targets)) == 2
    write_fills(fills.take(np.array([1])), targets)
    assert second.tolist() == [[1.0, 1.0]] * 6 + [[0.5, 0.5]] * 2
    left = unmet_fills(fills, targets)
    assert left.block.tolist() == [0]
    write_fills(left, targets)
    assert first.tolist() == [[1.0] * 4 + [0.0] * 2] * 4
    assert len(unmet_fills(fills, targets)) == 0
    first[3, 5] = float("nan")
    assert unmet_fills(fills, targets).block.tolist() == [0]
