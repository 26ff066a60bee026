"""Options of hold, join and status: what is refused before anything is started, and how a standing looks."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from headrace.cli.hold import _host
from headrace.cli.main import app
from headrace.cli.members import invitation_of, with_nics
from headrace.cli.status import standing_table
from headrace.config import HostSettings
from headrace.errors import ConfigError
from headrace.server.invitation import Invitation
from headrace.transports import mooncake_engine, nics
from headrace.transports.nics import RdmaDevice
from headrace.wire import HolderStanding, MemberStanding, Standing

HERE = Invitation("tcp://127.0.0.1:7000", "k" * 40, "secret")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--bind", "0.0.0.0", "--transport", "mooncake"], "authenticates nobody"),
        (["--bind", "10.1.2.3:7000", "--transport", "mooncake"], "--allow-unauthenticated-data-plane"),
        (["--transport", "rdma"], "choose tcp or mooncake"),
        (["--bind", "host:port"], "HOST or HOST:PORT"),
        (["--bind", ":7000"], "HOST or HOST:PORT"),
        (["--bind", "127.0.0.1:70000"], "HOST or HOST:PORT"),
        (["--bind", "0.0.0.0:5555"], "HEADRACE_ADVERTISE"),
        (["--with", "/nonexistent"], "cannot be read"),
    ],
)
def test_what_hold_refuses(options: list[str], complaint: str, tmp_path: Path) -> None:
    result = CliRunner(env={"HEADRACE_ADVERTISE": None}).invoke(app, ["hold", "--checkpoint", str(tmp_path), *options])
    assert result.exit_code == 1
    assert complaint in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("bind", "advertise", "variable", "told"),
    [
        ("0.0.0.0:5555", None, "10.0.0.5", "10.0.0.5"),
        ("0.0.0.0:5555", "10.0.0.7", "10.0.0.5", "10.0.0.7"),
        ("::", "10.0.0.7", "", "10.0.0.7"),
        ("10.0.0.6:5555", None, "10.0.0.5", "10.0.0.5"),
        ("10.0.0.6", None, "", "10.0.0.6"),
        (None, None, "10.0.0.5", "10.0.0.5"),
    ],
)
def test_what_others_are_told_to_dial(
    bind: str | None, advertise: str | None, variable: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_ADVERTISE", variable)
    assert _host(bind, advertise, "tcp", allowed=False).advertise_host == told


def test_ways_to_name_a_keeper(tmp_path: Path) -> None:
    HERE.save(tmp_path / "metas", {})
    (tmp_path / "token").write_text(HERE.secret + "\n")
    assert invitation_of(None, None, tmp_path / "metas") == HERE
    assert invitation_of("127.0.0.1:7000", HERE.secret, None) == HERE
    assert invitation_of("127.0.0.1:7000", f"@{tmp_path / 'token'}", None) == HERE
    for address, token, metas in (
        (None, None, None),
        ("127.0.0.1:7000", None, None),
        ("127.0.0.1:7000", "@/nonexistent", None),
        ("127.0.0.1:7000", None, tmp_path / "metas"),
    ):
        with pytest.raises(ConfigError):
            invitation_of(address, token, metas)


HOST = HostSettings(socket_dir=Path("/nonexistent"), permitted_uids=frozenset())
UP, DOWN = RdmaDevice("mlx5_0", 1, 400.0, True, 0), RdmaDevice("mlx5_1", 1, 400.0, False, 0)


@pytest.mark.parametrize(
    ("devices", "option", "variable", "chosen"),
    [
        ([], None, "", ()),
        ([DOWN], None, "", ()),
        ([UP, DOWN], None, "", ("mlx5_0",)),
        ([UP, DOWN], None, "mlx5", ("mlx5_0",)),
        ([UP, DOWN], "tcp", "mlx5", ()),
        ([UP, DOWN], "mlx5_0", "mlx5_9", ("mlx5_0",)),
    ],
)
def test_devices_that_are_chosen(
    devices: list[RdmaDevice],
    option: str | None,
    variable: str,
    chosen: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(nics, "rdma_devices", lambda: devices)
    monkeypatch.setenv("NCCL_IB_HCA", variable)
    assert with_nics(HOST, option, "mooncake").mooncake_nics == chosen
    assert capsys.readouterr().err == ""


def test_a_variable_that_names_no_device_means_tcp(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nics, "rdma_devices", lambda: [DOWN])
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    assert with_nics(HOST, None, "mooncake") == HOST
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: NCCL_IB_HCA: 'mlx5' names no interface")
    with pytest.raises(ConfigError, match="--nics: 'mlx5' names no .*; --nics tcp uses none"):
        with_nics(HOST, "mlx5", "mooncake")


@pytest.mark.parametrize("transport", ["tcp", "memory", "auto"])
def test_devices_matter_only_to_mooncake(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_engine, "missing", lambda: "not installed")
    monkeypatch.setattr(nics, "rdma_devices", lambda: [UP])
    assert with_nics(HOST, None, transport) == HOST
    assert with_nics(HOST, "mlx5_9", transport) == HOST


def test_a_variable_of_the_cluster_does_not_keep_hold_from_tcp(tmp_path: Path) -> None:
    result = CliRunner(env={"NCCL_IB_HCA": "no_such_nic"}).invoke(app, ["hold", "--checkpoint", str(tmp_path)])
    assert result.stderr.startswith("error: "), result.output
    assert "interface" not in result.stderr


def test_a_standing_is_readable() -> None:
    holders = (
        HolderStanding("holder-0-aa", "10.0.0.1", 4, 1 << 30),
        HolderStanding("holder-0-bb", "10.0.0.2", 4, 1 << 30, "keeper on b"),
    )
    members = (
        MemberStanding(
            "gpu7 vllm=http://x", 4, {"holder-0-aa": 1 << 29, "holder-0-bb": 1 << 28}, 1 << 30, 2.0
        ),
        MemberStanding("gpu8", None, {}, 0, 9.0, ("vllm=http://y",)),
    )
    console = Console(width=160, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(standing_table(Standing(holders, members)))
    console.file.close()
    text = console.export_text()
    for word in ("holder-0-aa: 512 MiB", "75% of 1 GiB", "keeper on b", "this keeper", "vllm=http://y"):
        assert word in text
