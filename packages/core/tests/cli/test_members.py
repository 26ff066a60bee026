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


def test_no_devices_mean_tcp() -> None:
    host = HostSettings(socket_dir=Path("/nonexistent"), permitted_uids=frozenset())
    assert with_nics(host, "tcp") == host


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
