"""run_ranks ends with results or the first failure, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headrace.testing.leaks import descendants, left_over, snapshot
from headrace.testing.ranks import RankError, run_ranks


def double(rank: int, world_size: int, factor: int) -> tuple[int, int]:
    return rank * factor, world_size


def raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the second rank")
    time.sleep(600)


def die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def sleep_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


def add_up(rank: int, world_size: int, rendezvous: str) -> float:
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world_size)
    total = torch.tensor(float(rank + 1))
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    return total.item()


def test_results_come_by_rank() -> None:
    assert run_ranks(double, 3, 60, 7) == [(0, 3), (7, 3), (14, 3)]


def test_ranks_talk(tmp_path: Path) -> None:
    assert run_ranks(add_up, 2, 60, str(tmp_path / "rendezvous")) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("function", "text"), [(raise_on_one, "KeyError: 'the second rank'"), (die_on_one, "died")]
)
def test_the_first_failure_ends_all(function: Callable[..., object], text: str) -> None:
    run_ranks(double, 1, 60, 1)
    before, others = snapshot(), descendants()
    begin = time.monotonic()
    with pytest.raises(RankError, match=text) as caught:
        run_ranks(function, 2, 60)
    assert caught.value.rank == 1
    assert ("raise_on_one" in caught.value.traceback) == (function is raise_on_one)
    assert time.monotonic() - begin < 40
    assert set(descendants()) <= set(others)
    assert left_over(before) == []


def test_a_late_rank_is_killed_at_the_deadline() -> None:
    others = descendants()
    with pytest.raises(RankError, match=r"\[1\].*12 s"):
        run_ranks(sleep_on_one, 2, 12)
    assert set(descendants()) <= set(others)


def test_a_function_that_cannot_be_found_says_so() -> None:
    with pytest.raises(RankError, match="module level"):
        run_ranks(lambda rank, world_size: None, 1, 60)
