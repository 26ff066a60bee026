"""Instances that come: from one keeper and from several, on this host and over a network, into real engines."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from p2p_world import Command, HoldProcess, join_arguments, need_mooncake, run_join
from safetensors.torch import load_file

from headrace.config import Deadlines, HostSettings
from headrace.control.hub import Hub
from headrace.server.holders import HolderPool, SourceSpec
from headrace.server.invitation import Invitation
from headrace.server.keeping import Keeper
from headrace.server.membership import Membership
from headrace.server.switchboard import Switchboard
from headrace.store.checkpoint import CheckpointSource
from headrace.store.tensors import TensorSource
from headrace.testing.engine_process import EngineProcess
from headrace.testing.leaks import descendants

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


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_status_that_goes_on_tells_each_look_also_where_no_terminal_is(
    checkpoints: list[Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    with (
        HoldProcess(checkpoints[0], tmp_path / "metas") as keeper,
        Command("status", "--load-metas", keeper.metas, "--live", "--every-s", "0.1", *options) as status,
    ):
        assert status.process.stdout is not None
        looks = (line for line in status.process.stdout if keeper.holders[0] in line)
        assert next(looks)
        assert next(looks)
        status.process.send_signal(signal.SIGINT)
        code, _, err = status.end(30.0)
        assert (code, err) == (0, "")


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


def test_a_join_beside_an_update_ends_on_one_whole_version(
    checkpoints: list[Path], engine: EngineProcess, tmp_path: Path
) -> None:
    """One instance is brought to a version by an update and to another by a join, both at once."""
    version = (engine.status()["weight_version"] or 0) + 1
    served_by = {version: checkpoints[version % 2], version + 1: checkpoints[(version + 1) % 2]}
    update = ["update", "--checkpoint", served_by[version + 1], "--to", engine.target]
    with HoldProcess(served_by[version], tmp_path / "metas", "--version", str(version)) as keeper:
        arguments = join_arguments(engine.target, keeper.metas, "--transport", "tcp")
        with Command(*arguments) as join, Command(*update, "--version", str(version + 1)) as other:
            ends = {version: join.end(), version + 1: other.end()}
    assert any(code == 0 for code, _, _ in ends.values()), ends
    served = engine.status()["weight_version"]
    assert ends[served][0] == 0, ends
    assert engine.differences(served_by[served]) == []
    assert not engine.health()["paused"]


def test_a_join_while_its_source_publishes_ends_on_one_whole_version(
    checkpoints: list[Path], engine: EngineProcess, tmp_path: Path, socket_dir: Path
) -> None:
    """The keeper's source changes all its tensors and publishes them, again and again, until the join has ended."""
    first = (engine.status()["weight_version"] or 0) + 1
    version, metas = first, tmp_path / "metas"
    with (
        published(checkpoints, first, socket_dir, metas) as publish,
        Command(*join_arguments(engine.target, metas, "--transport", "tcp")) as join,
    ):
        while join.process.poll() is None:
            version += 1
            publish(version)
        code, out, err = join.end()
    assert code == 0, err
    joined = json.loads(out)["version"]
    assert first <= joined <= version
    assert version > first + 1, "nothing was published meanwhile"
    assert engine.status()["weight_version"] == joined
    assert engine.differences(checkpoints[joined % 2]) == []


@contextmanager
def published(
    checkpoints: Sequence[Path], first: int, socket_dir: Path, metas: Path
) -> Iterator[Callable[[int], None]]:
    """Keep the tensors of checkpoint `version % 2` as version `first`; yield what replaces them by those of another."""
    weights = [load_file(next(one.glob("*.safetensors"))) for one in checkpoints]
    tensors = {name: value.clone() for name, value in weights[first % 2].items()}
    host = HostSettings(socket_dir=socket_dir, permitted_uids=frozenset({os.getuid()}))
    board = Switchboard(Hub(host))
    pool = HolderPool(SourceSpec(source=TensorSource(tensors)), board, host)
    try:
        with Keeper(pool, host) as keeper:

            def publish(version: int) -> None:
                for name, value in weights[version % 2].items():
                    tensors[name].copy_(value)
                keeper.offer(pool.publish(version, Deadlines()))

            pool.ensure(1)
            publish(first)
            keeper.exchange.invitation.save(metas, {})
            yield publish
    finally:
        pool.stop()
        board.close()


@pytest.mark.slow
def test_ranks_of_torchrun_hold_a_part_each(
    checkpoints: list[Path], engine: EngineProcess, tmp_path: Path
) -> None:
    """Two processes hold halves; a joiner reads from both, and both end with their launcher."""
    version = (engine.status()["weight_version"] or 0) + 1
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--version", str(version)]
    hold = HoldProcess(checkpoints[0], tmp_path / "metas", *options, program=[*launch, "-m", "headrace"])
    with hold as keeper:
        ranks = descendants(keeper.process.pid)
        report = run_join(engine.target, keeper.metas, "--transport", "tcp")
        assert len(keeper.holders) == 2
        assert set(report["join"]["from_holders"]) == set(keeper.holders)
        assert min(report["join"]["from_holders"].values()) > tensor_bytes(checkpoints[0]) // 4
        assert engine.differences(checkpoints[0]) == []
    assert len(ranks) >= 2
    limit = time.monotonic() + 20
    while any(alive(pid) for pid in ranks) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in ranks)


def alive(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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
        for child in descendants(keeper.process.pid):
            if b"headrace.holder" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
        code, _, err = keeper.end()
        assert (code, "holder 0 was lost in keeping what it holds" in err) == (1, True), "nobody can join any more"


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
