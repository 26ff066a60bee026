"""Several hosts as namespaces: spread reads, holders that die, hang or lose their network in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from p2p_hosts import Host, switched
from p2p_world import HoldProcess, need_mooncake
from safetensors.torch import save_file

READER = Path(__file__).with_name("p2p_reader.py")
MBIT = 200
PATIENCE_S = "2"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 MB of random weights: about 4 s over one link, 1 s over four."""
    folder = tmp_path_factory.mktemp("weights")
    seed = torch.Generator().manual_seed(7)
    made = {f"layer.{i}.weight": torch.randn(1024, 512, generator=seed) for i in range(46)}
    save_file(made, folder / "model.safetensors")
    return folder


@contextmanager
def keepers(
    hosts: Sequence[Host], weights: Path, folder: Path, transport: str = "tcp"
) -> Iterator[list[HoldProcess]]:
    """Yield keepers on hosts that know each other."""
    with ExitStack() as stack:
        made: list[HoldProcess] = []
        for number, host in enumerate(hosts):
            partners = [option for keeper in made for option in ("--with", keeper.metas)]
            options = ["--transport", transport, *partners]
            if transport == "mooncake":
                options.append("--allow-unauthenticated-data-plane")
            hold = HoldProcess(
                weights,
                folder / f"metas-{number}",
                *options,
                prefix=host.prefix,
                environment=host.environment,
            )
            made.append(stack.enter_context(hold))
        yield made


class Reader:
    """A joiner on a host, as a process."""

    def __init__(self, host: Host, keeper: HoldProcess, weights: Path, transport: str = "tcp") -> None:
        self.process = subprocess.Popen(
            [
                *host.prefix,
                sys.executable,
                str(READER),
                str(keeper.metas),
                transport,
                str(weights),
                PATIENCE_S,
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | host.environment | {"OMP_NUM_THREADS": "1"},
        )

    def wait_reading(self) -> None:
        """Wait until the first bytes have come."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "reading\n"

    def result(self) -> dict[str, Any]:
        """Wait for the end."""
        out, _ = self.process.communicate(timeout=120)
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found


@pytest.mark.parametrize("transport", ["tcp", "mooncake"])
def test_four_holders_give_more_than_three_times_what_one_gives(
    weights: Path, socket_dir: Path, tmp_path: Path, transport: str
) -> None:
    if transport == "mooncake":
        need_mooncake()
    with switched(5, socket_dir, MBIT) as (joiner, *others):
        with keepers(others[:1], weights, tmp_path, transport) as (keeper,):
            one = Reader(joiner, keeper, weights, transport).result()
        (tmp_path / "four").mkdir()
        with keepers(others, weights, tmp_path / "four", transport) as made:
            four = Reader(joiner, made[0], weights, transport).result()
    assert one["equal"], one
    assert four["equal"], four
    assert set(four["transports"].values()) == {transport}, "no holder counts as one of the same host"
    assert len(four["given"]) == 4
    assert one["seconds"]["read"] / four["seconds"]["read"] >= 3.2, (one, four)


@pytest.mark.parametrize("transport", ["tcp", pytest.param("mooncake", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["killed", "stopped", pytest.param("cut", marks=pytest.mark.slow)])
def test_the_others_give_what_a_lost_holder_owed(
    weights: Path, socket_dir: Path, tmp_path: Path, how: str, transport: str
) -> None:
    if transport == "mooncake":
        need_mooncake()
    with (
        switched(4, socket_dir, MBIT) as (joiner, *others),
        keepers(others, weights, tmp_path, transport) as made,
    ):
        reader = Reader(joiner, made[0], weights, transport)
        reader.wait_reading()
        if how == "killed":
            made[1].kill()
        elif how == "stopped":
            made[1].stop()
        else:
            others[1].cut()
        found = reader.result()
        assert found.get("equal"), found
        assert set(found["transports"].values()) == {transport}
        assert "reader" not in [member.name for member in made[0].standing_from(joiner).members]


def test_nobody_is_left(weights: Path, socket_dir: Path, tmp_path: Path) -> None:
    with switched(3, socket_dir, MBIT) as (joiner, *others), keepers(others, weights, tmp_path) as made:
        reader = Reader(joiner, made[0], weights)
        reader.wait_reading()
        for keeper in made:
            keeper.kill()
        found = reader.result()
        assert "PeerLostError" in found["error"]
        assert all(name in found["error"] for keeper in made for name in keeper.holders)


def test_the_keeper_that_was_asked_may_go(weights: Path, socket_dir: Path, tmp_path: Path) -> None:
    """Its holders' bytes come from others, and new joiners are answered by its partners."""
    with switched(3, socket_dir, MBIT) as (joiner, *others), keepers(others, weights, tmp_path) as made:
        reader = Reader(joiner, made[0], weights)
        reader.wait_reading()
        made[0].kill()
        assert reader.result().get("equal")
        again = Reader(joiner, made[1], weights).result()
        assert again["equal"]
        assert list(again["given"]) == made[1].holders
