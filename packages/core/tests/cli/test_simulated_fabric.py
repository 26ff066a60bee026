"""`headrace plan --simulate` of links alone: the published cases, any cluster, and what cannot be."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from headrace.cli.main import app
from headrace.cli.simulated_fabric import Case
from headrace.errors import ConfigError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_published_cases() -> None:
    """Every prediction is within 10 % of its bound, and below what was published for the same links."""
    cases = json.loads(run("--simulate", "published", "--json"))["cases"]
    assert {case["ranks"] for case in cases} >= {8, 16, 256, 4096}
    for case in cases:
        best = min(route["seconds"] for route in case["routes"])
        assert all(route["share"] >= 1 / 1.1 for route in case["routes"])
        assert case["published_s"] is None or best < case["published_s"]


def test_the_table() -> None:
    text = run("--simulate", "gb=470,tp=8,pcie-gb=50")
    assert "1.175 s" in text
    assert "direct" in text
    assert "broadcast" in text


def test_speeds_count() -> None:
    slow, fast = (
        json.loads(run("--simulate", f"gb=100,tp=8,hosts=4,holders=1,nic-gbit={speed}", "--json"))["cases"][
            0
        ]["routes"][0]
        for speed in (100, 400)
    )
    assert slow["route"] == fast["route"] == "p2p"
    assert slow["seconds"] > 3 * fast["seconds"]
    assert slow["network_bytes"] == 100 * 10**9


@pytest.mark.parametrize(
    "spec",
    ["gb=0", "gb=1,tp=9", "gb=1,hosts=2,holders=2", "gb=x", "gb=1,gb=2", "gb=1,colour=3", "gb=1,tp=1.5"],
)
def test_what_cannot_be(spec: str) -> None:
    with pytest.raises(ConfigError):
        Case.parse(spec)
