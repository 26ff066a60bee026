"""Instances that come: from one keeper and from several, on this host and over a network, into real engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from p2p_world import Command, HoldProcess, join_arguments, run_join

from headrace.testing.engine_process import EngineProcess

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def engine(checkpoints: list[Path]) -> Iterator[EngineProcess]:
    """An engine that was started without weights; tests bring it version after version."""
    with EngineProcess(checkpoints[0], 2, "--load-format", "dummy") as made:
        yield made


def test_a_new_instance_gets_what_others_hold(checkpoints: list[Path], engine: EngineProcess, tmp_path: Path) -> None:
    with HoldProcess(checkpoints[0], tmp_path / "metas", "--version", "3") as keeper:
        report = run_join(engine.target, keeper.metas)
        assert report["version"] == 3
        assert engine.differences(checkpoints[0]) == []
        assert engine.status()["weight_version"] == 3
        assert set(report["join"]["from_holders"]) == set(keeper.holders)
        assert set(report["join"]["transports"].values()) == {"memory"}
