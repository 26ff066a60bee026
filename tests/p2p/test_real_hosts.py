"""Engines on hosts of their own: joined over the network, and updated together under torchrun."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from p2p_hosts import Host, switched
from p2p_world import Command, HoldProcess, join_arguments, need_mooncake

CHECK = Path(__file__).with_name("p2p_check.py")
PORT = "8000"
pytestmark = pytest.mark.timeout(280)


@contextmanager
def engines(hosts: Sequence[Host], model: Path, *options: str) -> Iterator[None]:
    """Run an engine on every host; joins and updates wait until they are up."""
    with ExitStack() as stack:
        for host in hosts:
            arguments = ["engine", "--model", model, "--host", host.address, "--port", PORT, *options]
            stack.enter_context(Command(*arguments, prefix=host.prefix, environment=host.environment))
        yield


def check(host: Host, checkpoint: Path) -> dict[str, Any]:
    """Return version and differences of a host's engine, asked on that host."""
    found: dict[str, Any] = json.loads(
        host.run(sys.executable, str(CHECK), f"http://{host.address}:{PORT}", str(checkpoint))
    )
    return found


@pytest.mark.parametrize("transport", ["auto", pytest.param("tcp", marks=pytest.mark.slow)])
def test_an_engine_joins_over_the_network(
    checkpoints: list[Path], socket_dir: Path, tmp_path: Path, transport: str
) -> None:
    """From two hosts that hold the version; nothing is mapped, as nobody is on its host."""
    with (
        switched(3, socket_dir) as (joiner, *others),
        engines([joiner], checkpoints[1], "--load-format", "dummy"),
        ExitStack() as stack,
    ):
        keepers: list[HoldProcess] = []
        for number, host in enumerate(others):
            partners = [option for keeper in keepers for option in ("--with", keeper.metas)]
            metas = tmp_path / f"metas-{number}"
            hold = HoldProcess(
                checkpoints[0], metas, *partners, prefix=host.prefix, environment=host.environment
            )
            keepers.append(stack.enter_context(hold))
        arguments = join_arguments(
            f"torch=http://{joiner.address}:{PORT}",
            keepers[0].metas,
            "--transport",
            transport,
            "--ready-s",
            "100",
        )
        with Command(*arguments, prefix=joiner.prefix, environment=joiner.environment) as join:
            code, out, err = join.end(150)
        assert code == 0, err
        report = json.loads(out)
        assert set(report["join"]["transports"].values()) == {"tcp"}
        assert set(report["join"]["from_holders"]) == {name for keeper in keepers for name in keeper.holders}
        assert {worker["transport"] for worker in report["workers"]} == {"memory"}, "from its host's memory"
        assert check(joiner, checkpoints[0]) == {"version": 1, "differences": []}


@pytest.mark.parametrize("route", ["broadcast", pytest.param("auto", marks=pytest.mark.slow)])
def test_hosts_are_updated_together_under_torchrun(
    checkpoints: list[Path], socket_dir: Path, tmp_path: Path, route: str
) -> None:
    """Every host reads a part of the checkpoint; each engine gets the whole."""
    with switched(2, socket_dir) as hosts, engines(hosts, checkpoints[1]), ExitStack() as stack:
        targets = [option for host in hosts for option in ("--to", f"torch=http://{host.address}:{PORT}")]
        report = tmp_path / "report.json"
        update = ["update", "--checkpoint", checkpoints[0], *targets, "--route", route, "--ready-s", "100"]
        ranks = [
            stack.enter_context(torchrun(hosts, number, [*map(str, update), "--report", str(report)]))
            for number in range(2)
        ]
        code, out, err = ranks[0].end(200)
        assert code == 0, (out, err)
        made = json.loads(report.read_text())
        assert {worker["route"] for worker in made["workers"]} == {"broadcast"}
        for host in hosts:
            assert check(host, checkpoints[0]) == {"version": made["version"], "differences": []}


def torchrun(hosts: Sequence[Host], number: int, arguments: Sequence[str]) -> Command:
    """Run a command as one of two ranks of torchrun, on its host."""
    host = hosts[number]
    return Command(
        *arguments, program=launch(hosts, number), prefix=host.prefix, environment=rank_environment(host)
    )


def launch(hosts: Sequence[Host], number: int) -> list[str]:
    """Return the command line of torchrun on one of two hosts."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--node-rank", str(number), "--master-addr", hosts[0].address, "--master-port", "29511",
        "-m", "headrace",
    ]  # fmt: skip


def rank_environment(host: Host) -> dict[str, str]:
    """Return the variables of a rank on a host."""
    return host.environment | {"GLOO_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize("transport", ["tcp", pytest.param("mooncake", marks=pytest.mark.slow)])
def test_hosts_hold_a_version_together_under_torchrun(
    checkpoints: list[Path], socket_dir: Path, tmp_path: Path, transport: str
) -> None:
    """Each host keeps a half, the keeper names both, and an engine on a third host reads from both."""
    if transport == "mooncake":
        need_mooncake()
    with (
        switched(3, socket_dir) as (joiner, *others),
        engines([joiner], checkpoints[1], "--load-format", "dummy"),
        ExitStack() as stack,
    ):
        metas = tmp_path / "metas"
        options = ["--transport", transport, "--allow-unauthenticated-data-plane"]
        second = torchrun(others, 1, ["hold", "--checkpoint", str(checkpoints[0]), *options])
        stack.enter_context(second)
        program, environment = launch(others, 0), rank_environment(others[0])
        keeper = HoldProcess(
            checkpoints[0], metas, *options, program=program, prefix=others[0].prefix, environment=environment
        )
        stack.enter_context(keeper)
        assert len(keeper.holders) == 2
        assert {holder.name for holder in keeper.standing_from(joiner).holders} == set(keeper.holders)
        target = f"torch=http://{joiner.address}:{PORT}"
        arguments = join_arguments(target, metas, "--ready-s", "100")
        with Command(*arguments, prefix=joiner.prefix, environment=joiner.environment) as join:
            code, out, err = join.end(150)
        assert code == 0, err
        given = json.loads(out)["join"]
        assert set(given["from_holders"]) == set(keeper.holders)
        assert min(given["from_holders"].values()) > sum(given["from_holders"].values()) // 4
        assert set(given["transports"].values()) == {transport}
        assert check(joiner, checkpoints[0]) == {"version": 1, "differences": []}
