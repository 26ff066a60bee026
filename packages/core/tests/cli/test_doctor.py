"""`headrace doctor` never fails; it says what does not work, and why."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli import doctor
from headrace.cli.main import app

Found = dict[tuple[str, str], doctor.Check]


def _examined() -> Found:
    return {(check.area, check.name): check for check in doctor.examine()}


def test_json_lists_checks_with_four_keys() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    assert all(set(check) == {"area", "name", "state", "detail"} for check in checks)
    assert all(check["state"] in doctor.COLOURS for check in checks)
    assert all(check["detail"] for check in checks if check["state"] != "ok")
    areas = list(dict.fromkeys(check["area"] for check in checks))
    assert areas == ["host", "devices", "collectives", "routes", "engines", "trainers", "transports"]


def test_table_shows_every_area() -> None:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("shared memory", "torch", "gloo", "direct over tcp", "vllm", "mooncake"):
        assert word in result.stdout


def test_sealed_memory_and_torch_work_here() -> None:
    found = _examined()
    assert found["host", "shared memory"].state == "ok"
    assert found["devices", "torch"].state == "ok"


def test_socket_folder_is_tried_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def socket_folder(folder: Path) -> doctor.Check:
        monkeypatch.setenv("HEADRACE_SOCKET_DIR", str(folder))
        return _examined()["host", "socket folder"]

    with tempfile.TemporaryDirectory(prefix="hr-") as short:
        good = Path(short) / "s"
        assert socket_folder(good).state == "ok"
        assert socket_folder(good).detail.startswith(f"{good}, mode 0700, ")
        assert list(good.iterdir()) == []
    too_long = socket_folder(tmp_path / ("x" * 100))
    assert too_long.state == "missing"
    assert "set HEADRACE_SOCKET_DIR to a shorter folder" in too_long.detail


def test_a_bad_environment_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_PERMITTED_UIDS", "root")
    check = _examined()["host", "socket folder"]
    assert check.state == "missing"
    assert "HEADRACE_PERMITTED_UIDS" in check.detail


def test_a_route_that_lacks_something_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    found = _examined()
    assert found["host", "shared memory"].state == "missing"
    assert found["routes", "direct"].state == "missing"
    assert "Function not implemented" in found["routes", "direct"].detail
    assert found["routes", "p2p"].detail.startswith("mooncake: ")
