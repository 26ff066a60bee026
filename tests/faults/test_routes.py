"""Every route, verification and ring, over any number of workers and holders: the same bytes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from faults_world import MakeWorld

TINY, SMALL, LARGE = 4096, 20_000, 64 << 20


def ring_of(report: Any) -> set[str]:
    return {worker.ring.split(":")[0] for worker in report.workers}


@pytest.mark.parametrize(
    ("workers", "layout"),
    [
        (1, {}),
        (2, {"dtype": "float32"}),
        (2, {"transposed": True, "padding": 3}),
        (3, {"padding": 5}),
        (3, {"dtype": "float32", "transposed": True}),
    ],
)
def test_every_route_brings_the_same_bytes(make_world: MakeWorld, workers: int, layout: dict[str, Any]) -> None:
    """Routes, transports and verifications in one random order, each with other weights than the one before."""
    world = make_world(workers=workers, **layout)
    choices = [
        {"route": route, "transport": transport, "verify": verify, "bucket_bytes": bucket}
        for route, transport in (("direct", "auto"), ("direct", "tcp"), ("broadcast", "auto"))
        for verify in ("digest", "full", "none")
        for bucket in (SMALL, LARGE)
    ]
    random.Random(workers).shuffle(choices)
    servers = {seed: world.server(seed) for seed in (2, 3)}
    for number, choice in enumerate(choices):
        seed = 2 + number % 2
        report = world.update(servers[seed], seed, **choice)
        assert {worker.route for worker in report.workers} == {choice["route"]}
        assert bool(report.workers[0].casts) == (layout.get("dtype") == "float32")
    world.heals()


@pytest.mark.parametrize("holders", [2, 3])
def test_holders_share_a_checkpoint(make_world: MakeWorld, holders: int) -> None:
    world = make_world(workers=2)
    server = world.server(2, holders=holders)
    for route in ("direct", "broadcast"):
        for verify in ("digest", "full"):
            world.update(server, 2, route=route, verify=verify, bucket_bytes=SMALL)
    world.heals()


@pytest.mark.parametrize(("route", "transport"), [("broadcast", "auto"), ("direct", "tcp")])
def test_the_budget_decides_the_ring(make_world: MakeWorld, route: str, transport: str) -> None:
    """The bytes are the same whether all is staged, slots go round in the pause, or one slot is all there is."""
    world = make_world(workers=2)
    server = world.server(2)
    for budget, ring in ((1 << 30, "staged"), (30_000, "overlapped"), (TINY + 1024, "serial")):
        for verify in ("digest", "full", "none"):
            report = world.update(
                server, 2, route=route, transport=transport, verify=verify, budget_bytes=budget, bucket_bytes=TINY
            )
            assert ring_of(report) == {ring}
    world.heals()


def test_the_budget_decides_whether_rows_are_gathered(make_world: MakeWorld) -> None:
    """Out of mapped memory: scattered rows go by way of a buffer where there is room for it."""
    world = make_world(workers=2)
    servers = {seed: world.server(seed) for seed in (2, 3)}
    for budget, ring in ((1 << 30, "gathered"), (0, "none")):
        for number, verify in enumerate(("digest", "full", "none")):
            seed = 2 + number % 2
            report = world.update(servers[seed], seed, route="direct", verify=verify, budget_bytes=budget)
            assert ring_of(report) == {ring}
    world.heals()


def test_a_dummy_start_learns_from_its_first_update(make_world: MakeWorld) -> None:
    """The first update goes through the loader, the second by recipe."""
    world = make_world(workers=2, loaded_seed=None)
    first = world.update(world.server(2), 2)
    assert first.first
    assert all(worker.opaque_names for worker in first.workers)
    second = world.update(world.server(3), 3)
    assert not second.first
    assert not any(worker.opaque_names for worker in second.workers)


def test_versions_change_only_by_success(make_world: MakeWorld) -> None:
    world = make_world(workers=1)
    server = world.server(2)
    world.update(server, 2, version=5)
    for stale in (0, 4, 5):
        error = world.fails(server, version=stale)
        assert "does not grow" in str(error)
        assert "at least 6" in str(error)
        world.check()
    assert world.update(server, 2).version == 6


def test_many_updates_leak_nothing(make_world: MakeWorld) -> None:
    """Twenty more of each route hold no more memory, descriptors, threads or processes than the first few."""
    from headrace.testing.leaks import left_over, snapshot

    world = make_world(workers=2)
    server = world.server(2)
    routes: list[dict[str, Any]] = [{}, {"transport": "tcp"}, {"route": "broadcast"}]

    def rounds(count: int) -> None:
        for number in range(count):
            server.update(world.control, **routes[number % 3])

    rounds(6)
    before = snapshot()
    rounds(21)
    world.version = 27
    world.seed = 2
    world.check()
    assert left_over(before) == []


