"""Instances that come: from one keeper and from several, on this host and over a network, into real engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from p2p_world import Command, HoldProcess, join_arguments, need_mooncake, run_join

from headrace.server.invitation import Invitation
from headrace.server.membership import Membership
from headrace.store.checkpoint import CheckpointSource
from headrace.testing.engine_process import EngineProcess

pytestmark = pytest.mark.timeout(300)


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


@pytest.mark.parametrize(
    ("transport", "num_keepers"),
    [
        ("tcp", 4),
        ("mooncake", 2),
        pytest.param("tcp", 1, marks=pytest.mark.slow),
        pytest.param("tcp", 2, marks=pytest.mark.slow),
        pytest.param("mooncake", 1, marks=pytest.mark.slow),
        pytest.param("mooncake", 4, marks=pytest.mark.slow),
    ],
)
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


def test_an_update_leaves_its_holder_to_be_joined(
    checkpoints: list[Path], engine: EngineProcess, tmp_path: Path
) -> None:
    """`update --keep-held` serves one engine and then gives the same version to another, which keeps it as well."""
    version = str((engine.status()["weight_version"] or 0) + 1)
    update = [
        "update",
        "--checkpoint",
        checkpoints[0],
        "--to",
        engine.target,
        "--version",
        version,
        "--keep-held",
    ]
    with (
        EngineProcess(checkpoints[1], 1, "--load-format", "dummy") as other,
        Command(*update) as keeper,
    ):
        address, token = keeper.read_until("address"), keeper.read_until("token")
        join = ["join", "--from", address, "--to", other.target, "--keep-held", "--transport", "tcp"]
        with Command(*join, environment={"HEADRACE_TOKEN": token}) as second:
            own_address, own_token = second.read_until("address"), second.read_until("token")
            assert other.differences(checkpoints[0]) == engine.differences(checkpoints[0]) == []
            assert other.status()["weight_version"] == int(version)
            invitation = Invitation.of(address, token)
            with Membership(invitation, "test") as member:
                assert len(member.standing().holders) == 2, "the joiner gives what it has read"
            with Membership(Invitation.of(own_address, own_token), "test") as member:
                assert len(member.ask(lease=False).manifests) == 2


def test_a_join_that_fails_leaves_the_engine_unready_and_can_be_repeated(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    with (
        EngineProcess(checkpoints[0], 1, "--load-format", "dummy") as fresh,
        HoldProcess(checkpoints[0], tmp_path / "metas") as keeper,
    ):
        with Command(*join_arguments(fresh.target, keeper.metas, "--version", "9")) as join:
            code, _, err = join.end()
        assert code == 1
        assert "version 9 is not held here; held: 1" in err
        assert fresh.health()["paused"]
        again = join_arguments(fresh.target, keeper.metas)
        with Command(*again) as one, Command(*again) as two:
            codes = sorted((one.end()[0], two.end()[0]))
        assert codes[0] == 0, "of two joins of one engine at once, one is sent away or comes second"
        assert not fresh.health()["paused"]
        assert fresh.differences(checkpoints[0]) == []
