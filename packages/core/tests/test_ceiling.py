"""The memory-copy ceiling: real processes, and none of them left."""

from __future__ import annotations

import pytest

from headrace.ceiling import measure_copy_ceiling
from headrace.errors import ConfigError, TransferTimeoutError


def test_all_processes_copy_in_every_round() -> None:
    found = measure_copy_ceiling(2, 1 << 20, rounds=5)
    assert (found.num_processes, found.bytes_each, len(found.rounds_s)) == (2, 1 << 20, 5)
    assert all(seconds > 0 for seconds in found.rounds_s)
    middle = sorted(found.rounds_s)[2]
    assert found.gb_per_s == pytest.approx(2 * (1 << 20) / middle / 1e9)


def test_nothing_to_copy_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 processes"):
        measure_copy_ceiling(0, 1 << 20)


def test_a_deadline_ends_the_processes() -> None:
    with pytest.raises(TransferTimeoutError, match="not ready in time"):
        measure_copy_ceiling(1, 1 << 20, deadline_s=0.0)
