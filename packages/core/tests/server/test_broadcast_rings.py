"""Where the rings of a broadcast lie, and what holders do that cannot have them on the GPU that is asked for."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch

from headrace.config import Deadlines, UpdateSettings, host_settings
from headrace.control.hub import Hub
from headrace.planner import Planner, ReceiverNeeds
from headrace.server.broadcast import BroadcastRun, Placement, RingHost, pair_with_holders
from headrace.server.holders import HolderPool, SourceSpec
from headrace.server.switchboard import Switchboard
from headrace.store.tensors import TensorSource
from headrace.testing.shapes import ModelShape, params_of, tp_recipe
from headrace.types import WorkerId

SHAPE = ModelShape(layers=1, hidden=64, vocab=256, heads=4, kv_heads=2, head_dim=16, intermediate=128)


def needs_of(*uuids: str, reachable: tuple[int, ...] = (0, 1), budget: int = 1 << 20) -> list[ReceiverNeeds]:
    params = params_of(SHAPE)
    return [
        ReceiverNeeds(
            worker=WorkerId("engine", rank),
            recipe=tp_recipe(params, len(uuids), rank, kv_heads=2),
            reachable=frozenset(reachable),
            budget_bytes=budget,
            device=f"cuda:{rank}" if uuid else "cpu",
            device_uuid=uuid,
        )
        for rank, uuid in enumerate(uuids)
    ]


def placed(needs: list[ReceiverNeeds], num_holders: int) -> Placement:
    return Placement.of(pair_with_holders([True] * len(needs), needs), needs, num_holders)


def test_a_gpu_has_one_holder_and_workers_of_one_gpu_share_it() -> None:
    assert pair_with_holders([True] * 4, needs_of("a", "b", "a", "b")) == [0, 1, 0, 1]
    assert pair_with_holders([True] * 4, needs_of("", "", "", "")) == [0, 1, 0, 1]
    assert pair_with_holders([True, False, True], needs_of("a", "b", "c")) == [0, None, 1]


def test_slots_lie_on_gpus_where_every_holder_serves_one() -> None:
    found = placed(needs_of("a", "b"), 2)
    assert (found.devices, found.transport) == (("a", "b"), "nccl")
    assert "GPU memory" in found.why
    alone = placed(needs_of("a", "a", reachable=(0,)), 1)
    assert (alone.devices, alone.transport) == (("a",), "memory")


@pytest.mark.parametrize(
    ("needs", "num_holders", "reason"),
    [
        (needs_of("a"), 2, "holder 1 serves 0 GPUs"),
        (needs_of("a", "b", reachable=(0,)), 1, "holder 0 serves 2 GPUs"),
        (needs_of("a", ""), 2, "not on a GPU"),
    ],
)
def test_otherwise_they_lie_in_host_memory_and_the_reason_is_said(
    needs: list[ReceiverNeeds], num_holders: int, reason: str
) -> None:
    found = placed(needs, num_holders)
    assert found.devices == ("",) * num_holders
    assert found.transport is None
    assert reason in found.why
    assert "host memory" in found.why


def test_on_cpus_there_is_nothing_to_say() -> None:
    assert placed(needs_of("", ""), 2) == Placement((0, 1), ("", ""), "")


def test_a_kept_ring_counts_as_free_and_a_budget_does_not_grow_by_it() -> None:
    rings, needs = RingHost("127.0.0.1", "127.0.0.1"), needs_of("a", "b", budget=1000)
    rings.note(needs, placed(needs, 2), 300)
    assert rings.budget_bytes("a", 700) == 1000
    assert rings.budget_bytes("a", 850) == 1000
    assert rings.budget_bytes("a", 500) == 800
    assert rings.budget_bytes("a", 2000) == 2000
    assert rings.budget_bytes("c", 700) == 700
    assert rings.on_gpus(("b", "a"))
    rings.broken()
    assert not rings.on_gpus(("a", "b"))
    assert rings.budget_bytes("a", 700) == 700


@pytest.fixture
def pool() -> Iterator[HolderPool]:
    host = host_settings()
    board = Switchboard(Hub(host))
    source = TensorSource({m.name: torch.randn(m.shape).bfloat16() for m in params_of(SHAPE)})
    pool = HolderPool(SourceSpec(source=source), board, host)
    try:
        yield pool
    finally:
        pool.stop()
        board.close()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a machine without a GPU: real holders that refuse one"
)
def test_holders_without_the_gpu_fall_back_to_rings_in_host_memory(pool: HolderPool) -> None:
    pool.ensure(2)
    manifests = pool.publish(1, Deadlines())
    needs = needs_of("GPU-of-nobody", "GPU-of-nobody-else")
    plan = Planner().plan(manifests, needs, UpdateSettings(route="broadcast"))
    assert plan.broadcast is not None
    rings = RingHost("127.0.0.1", "127.0.0.1")
    run = BroadcastRun(plan.broadcast, pool.peers, rings, placed(needs, 2))
    addresses = [manifest.holder for manifest in manifests]
    found = run.start(1, needs, addresses, Deadlines())
    try:
        assert [ring.ring.kind for ring in found if ring] == ["host", "host"]
        noted = run.noted(plan.receivers[0])
        assert "host memory, since holder 0 cannot" in noted.ring.why
        assert "sees no GPU" in noted.ring.why
        assert noted.transport == "collective"
        assert not rings.on_gpus(("GPU-of-nobody", "GPU-of-nobody-else"))
    finally:
        assert run.cancel() is None


def test_members_are_told_the_address_that_others_reach() -> None:
    """Not the one that is listened on, which on another host is that host."""
    rings = RingHost("0.0.0.0", "127.0.0.2")
    host, _, port = rings.address([1, 2]).rpartition(":")
    assert host == "127.0.0.2"
    with socket.create_connection((host, int(port)), 5):
        pass
