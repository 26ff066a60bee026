"""Instances that come: from one keeper and from several, on this host and over a network, into real engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from p2p_world import HoldProcess, need_mooncake, run_join

from headrace.store.checkpoint import CheckpointSource
from headrace.testing.engine_process import EngineProcess

pytestmark = pytest.mark.timeout(240)


def tensor_bytes(checkpoint: Path) -> int:
    """Return the bytes of all tensors of a checkpoint."""
    source = CheckpointSource(checkpoint)
    source.close()
    return int(source.metadata().num_bytes.sum())


@pytest.fixture(scope="module")
def engine(checkpoints: list[Path]) -> Iterator[EngineProcess]:
    """An engine that was started without weights; tests bring it version after version."""
    with EngineProcess(checkpoints[0], 2, "--load-format", "dummy") as made:
        yield made


def test_a_new_instance_gets_what_others_hold(
    checkpoints: list[Path], engine: EngineProcess, tmp_path: Path
) -> None:
    with HoldProcess(checkpoints[0], tmp_path / "metas", "--version", "3") as keeper:
        report = run_join(engine.target, keeper.metas)
        assert report["version"] == 3
        assert engine.differences(checkpoints[0]) == []
        assert engine.status()["weight_version"] == 3
        assert set(report["join"]["from_holders"]) == set(keeper.holders)
        assert set(report["join"]["transports"].values()) == {"memory"}


@pytest.mark.parametrize("num_keepers", [1, 2, 4])
@pytest.mark.parametrize("transport", ["tcp", "mooncake"])
def test_a_version_is_read_from_all_who_hold_it(
    transport: str, num_keepers: int, checkpoints: list[Path], engine: EngineProcess, tmp_path: Path
) -> None:
    if transport == "mooncake":
        need_mooncake()
    with ExitStack() as stack:
        keepers: list[HoldProcess] = []
        version = (engine.status()["weight_version"] or 0) + 1
        for number in range(num_keepers):
            partners = [option for keeper in keepers for option in ("--with", keeper.metas)]
            options = ["--version", str(version), "--transport", transport, *partners]
            keepers.append(
                stack.enter_context(
                    HoldProcess(checkpoints[version % 2], tmp_path / f"metas-{number}", *options)
                )
            )
        report = run_join(engine.target, keepers[0].metas, "--transport", transport)
        given = report["join"]["from_holders"]
        assert set(given) <= {name for keeper in keepers for name in keeper.holders}
        assert len(given) >= min(2, num_keepers)
        assert sum(given.values()) == tensor_bytes(checkpoints[version % 2])
        assert set(report["join"]["transports"].values()) == {transport}
        assert engine.differences(checkpoints[version % 2]) == []
