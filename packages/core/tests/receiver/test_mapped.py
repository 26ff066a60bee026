"""What is bound to mapped memory stays as long as plan, mappings and destinations do, and no longer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.config import host_settings
from headrace.geometry import RegionTable
from headrace.manifest import HolderAddress
from headrace.plan import CopyTable, Ring, TransferPlan
from headrace.receiver.blocks import StagingArea
from headrace.receiver.mapped import Mappings
from headrace.recipe import FillTable, LoadRecipe
from headrace.segments.host import HostSegment
from headrace.segments.lending import Lender
from headrace.testing.copies import CopyRow, table_of
from headrace.testing.leaks import left_over, snapshot
from headrace.types import I32, ParamMeta, ParamTable

SIZE = 64
DEADLINE_S = 5.0


@pytest.fixture
def lender(tmp_path: Path) -> Iterator[Lender]:
    made = Lender(host_settings({"HEADRACE_SOCKET_DIR": str(tmp_path)}))
    made.start()
    yield made
    made.close()


def plan_of(segment: HostSegment, key: str = "plan") -> TransferPlan:
    row = CopyRow(shape=(SIZE,), src_strides=(1,), dst_strides=(1,), src_dtype="uint8", dst_dtype="uint8")
    none = np.zeros(0, np.int64)
    first: I32 = np.zeros(1, np.int32)
    return TransferPlan(
        "direct", "memory", "why", (segment.descriptor,), first, CopyTable.empty(), np.zeros(2, np.int64),
        table_of([row]), np.array([0, 1]), first, none, none.astype(np.int32), 1, SIZE, Ring("none", 0, 0, ""),
        np.zeros((0, 4), np.int64), key,
    )  # fmt: skip


def test_buckets_are_bound_once_for_each_set_of_segments(lender: Lender) -> None:
    memory, live = Mappings(StagingArea()), torch.zeros(SIZE, dtype=torch.uint8)
    sets = [HostSegment(SIZE, name) for name in ("one", "other")]
    holder = HolderAddress("h", lender.unix_socket)
    seen = []
    for turn in range(6):
        segment = sets[turn % 2]
        segment.tensor.fill_(turn + 1)
        if turn < 2:
            lender.lend(segment)
        memory.open(plan_of(segment), [holder], DEADLINE_S, pin=False)
        (bucket,) = memory.bind(plan_of(segment), [live])
        memory.keep(plan_of(segment))
        bucket.live.run()
        assert (live == turn + 1).all()
        seen.append(bucket)
    assert seen[2:] == seen[:2] * 2
    memory.close()


@pytest.mark.parametrize("changed", ["plan", "destination", "segment"])
def test_what_changes_is_bound_anew(lender: Lender, changed: str) -> None:
    memory, live = Mappings(StagingArea()), torch.zeros(SIZE, dtype=torch.uint8)
    segment, other = HostSegment(SIZE, "one"), HostSegment(SIZE, "other")
    holder = HolderAddress("h", lender.unix_socket)
    for one in (segment, other):
        lender.lend(one)
    first, second = plan_of(segment), plan_of(other if changed == "segment" else segment, "changed")
    if changed != "plan":
        second = replace(second, key=first.key)
    target = torch.zeros(SIZE, dtype=torch.uint8) if changed == "destination" else live
    memory.open(first, [holder], DEADLINE_S, pin=False)
    bound = memory.bind(first, [live])
    memory.keep(first)
    memory.open(second, [holder], DEADLINE_S, pin=False)
    again = memory.bind(second, [target])
    assert again is not bound
    other.tensor.fill_(9)
    segment.tensor.fill_(9)
    again[0].live.run()
    assert (target == 9).all()
    memory.close()


def test_what_is_staged_in_reserved_memory_stays_bound_and_else_does_not(lender: Lender) -> None:
    reserved, live = torch.zeros(256, dtype=torch.uint8), torch.zeros(SIZE, dtype=torch.uint8)
    segment, holder = HostSegment(2 * SIZE, "one"), HolderAddress("h", lender.unix_socket)
    lender.lend(segment)
    row = CopyRow(shape=(SIZE // 8, 8), src_strides=(16, 1), dst_strides=(8, 1), src_dtype="uint8", dst_dtype="uint8")
    plan = replace(plan_of(segment), apply=table_of([row]), ring=Ring("gathered", 0, 0, ""))
    for area, lasts in ((StagingArea(reserved), True), (StagingArea(reserved[:8]), False), (StagingArea(), False)):
        memory = Mappings(area)
        memory.open(plan, [holder], DEADLINE_S, pin=False)
        segment.tensor.random_()
        first = memory.bind(plan, [live])
        memory.keep(plan)
        assert (memory.bind(plan, [live]) is first) == lasts
        first[0].run_early(DEADLINE_S)
        first[0].live.run()
        assert torch.equal(live, segment.tensor.view(-1, 2, 8)[:, 0].flatten())
        memory.close()


@pytest.mark.parametrize("own", [True, False], ids=["this holder", "another"])
def test_what_dead_holders_lent_is_dropped_and_what_others_lend_is_kept(tmp_path: Path, *, own: bool) -> None:
    """A worker would keep the last two versions of every checkpoint that was ever brought by `headrace update`."""
    lenders = [Lender(host_settings({"HEADRACE_SOCKET_DIR": str(tmp_path)})).start() for _ in range(2)]
    segment, live = HostSegment(SIZE, "one"), torch.zeros(SIZE, dtype=torch.uint8)
    lenders[0].lend(segment)
    plan, holder = plan_of(segment), HolderAddress("h", lenders[0].unix_socket)
    memory, before = Mappings(StagingArea()), snapshot()
    memory.open(plan, [holder], DEADLINE_S, pin=False)
    bound = memory.bind(plan, [live])
    memory.keep(plan)
    lenders[0 if own else 1].close()
    memory.drop_dead(DEADLINE_S)
    if own:
        bound.clear()
        assert left_over(before, ignoring=("files",)) == []
    else:
        memory.open(plan, [holder], DEADLINE_S, pin=False)
        assert memory.bind(plan, [live]) is bound
    memory.close()
    for lender in lenders:
        lender.close()


def test_what_the_loader_reads_in_place_is_the_holders_memory(lender: Lender) -> None:
    memory, meta = Mappings(StagingArea()), ParamMeta("w", "float32", (4, 4))
    segment, holder = HostSegment(2 * SIZE, "one"), HolderAddress("h", lender.unix_socket)
    lender.lend(segment)
    table = ParamTable([meta])
    none = np.zeros(0, np.int32)
    recipe = LoadRecipe(
        table, table, RegionTable.from_rows([], 2), FillTable.empty(), np.zeros(1, np.int32), none, {},
        only_read=np.zeros(1, np.int32),
    )  # fmt: skip
    plan = replace(plan_of(segment), opaque=recipe.opaque, lent=np.array([[0, 0, 32, 64]]))
    memory.open(plan, [holder], DEADLINE_S, pin=False)
    found = memory.lent(plan, recipe, [holder], DEADLINE_S, pin=False)["w"]
    memory.close()
    segment.tensor.view(torch.float32)[8:24] = torch.arange(16.0)
    assert torch.equal(found, torch.arange(16.0).view(4, 4))
