"""Several engines in one update: side by side and rolling, and what the error says when one of them fails."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from faults_world import MakeWorld, World

from headrace.errors import CapacityError, UpdateFailedError
from headrace.telemetry import Span
from headrace.testing.faults import Fault

pytestmark = pytest.mark.timeout(120)


def stalls(report: Any) -> list[Span]:
    return sorted((span for span in report.spans if span.name == "stall"), key=lambda span: span.begin_s)


def test_a_rolling_update_pauses_one_engine_at_a_time(make_world: MakeWorld) -> None:
    worlds = [make_world(workers=1) for _ in range(3)]
    server = worlds[0].trainer(2)
    report = server.update([world.control for world in worlds], rolling=True)
    for world in worlds:
        world.seed, world.version = 2, report.version
        world.check()
        assert world.engine.pauses == 1
    assert [engine.address for engine in report.engines] == [world.control.address for world in worlds]
    assert all(engine.stall_s > 0 for engine in report.engines)
    found = stalls(report)
    assert len(found) == 3
    assert all(a.begin_s + a.duration_s <= b.begin_s for a, b in pairwise(found))


def test_a_rolling_update_ends_at_the_first_failure(make_world: MakeWorld) -> None:
    """The first serves the new weights, the second is mixed and paused, the third was never disturbed."""
    worlds = new, mixed, old = [make_world(workers=1) for _ in range(3)]
    server = new.trainer(2)
    mixed.arm(0, Fault(point="leave", action="fail", times=0))
    with pytest.raises(UpdateFailedError, match="injected") as caught:
        server.update([world.control for world in worlds], rolling=True)
    states = dict(zip((world.control.address for world in worlds), ("new", "mixed", "old"), strict=True))
    assert caught.value.engines == states
    assert all(f"{name} {state}" in str(caught.value) for name, state in states.items())
    new.seed, new.version = 2, caught.value.weight_version
    for world in (new, old):
        world.check()
    assert (mixed.engine.paused, old.engine.pauses) == (True, 0)
    mixed.arm(0)
    heal(worlds, server.update([world.control for world in worlds], rolling=True).version)


def heal(worlds: list[World], version: int) -> None:
    for world in worlds:
        world.seed, world.version = 2, version
        world.check()


def test_engines_do_not_roll_round_one_ring(make_world: MakeWorld) -> None:
    """A broadcast without a slot per bucket needs all engines paused: refused before any is."""
    worlds = [make_world(workers=1) for _ in range(2)]
    choices: dict[str, Any] = {"route": "broadcast", "bucket_bytes": 4096, "budget_bytes": 8192}
    controls = [world.control for world in worlds]
    server = worlds[0].server(2)
    with pytest.raises(CapacityError, match="--rolling"):
        server.update(controls, rolling=True, **choices)
    assert [world.engine.pauses for world in worlds] == [0, 0]
    heal(worlds, server.update(controls, **choices).version)
