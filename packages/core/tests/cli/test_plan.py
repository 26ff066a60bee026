"""`headrace plan`: of a simulated cluster, and of a real engine that must not notice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="the embedded engine needs the extra headrace[engine]")

from headrace.cli.main import app
from headrace.cli.plan import plan_json
from headrace.cli.simulated import Cluster
from headrace.config import UpdateSettings
from headrace.errors import ConfigError, UpdateFailedError
from headrace.server.parameter_server import ParameterServer
from headrace.testing.engine_process import EngineProcess
from headrace.testing.tiny_model import TinySize, make_tiny_qwen3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("plan")
    return [make_tiny_qwen3(root / str(seed), seed, shards=2) for seed in range(2)]


def _invoke(*args: str) -> str:
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, ["plan", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def _json(*args: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(_invoke(*args, "--json"))
    return data


def _model_bytes(checkpoint: Path) -> int:
    from headrace.store.checkpoint import CheckpointSource

    source = CheckpointSource(checkpoint)
    try:
        return int(source.metadata().num_bytes.sum())
    finally:
        source.close()


# ---- simulated


def test_one_host_is_served_from_its_memory(checkpoints: list[Path]) -> None:
    data = _json("--checkpoint", str(checkpoints[0]), "--simulate", "tp=2,instances=3")
    workers = data["workers"]
    assert [(w["instance"], w["rank"]) for w in workers] == [
        (f"instance-{i}", rank) for i in range(3) for rank in range(2)
    ]
    assert {(w["route"], w["transport"]) for w in workers} == {("direct", "memory")}
    assert all(w["from_holders"] == {"holder-0": w["bytes"]} for w in workers)
    assert all(w["live_bytes"] == w["bytes"] < _model_bytes(checkpoints[0]) for w in workers)
    assert data["holders"] == [{"name": "holder-0", "bytes": _model_bytes(checkpoints[0])}]
    assert data["predicted_s"] is None
    documented = plan_json.__doc__ or ""
    assert all(f"`{key}`" in documented for key in [*data, *workers[0], *data["holders"][0]])


def test_parts_on_several_hosts_are_broadcast(checkpoints: list[Path]) -> None:
    data = _json("--checkpoint", str(checkpoints[0]), "--simulate", "tp=2,instances=4,hosts=2,holders=2")
    whole = _model_bytes(checkpoints[0])
    assert sum(holder["bytes"] for holder in data["holders"]) == whole
    assert {w["route"] for w in data["workers"]} == {"broadcast"}
    assert all(sum(w["from_holders"].values()) == w["bytes"] == whole for w in data["workers"])
    assert all(len(w["from_holders"]) == 2 for w in data["workers"])


def test_a_far_holder_is_read_over_tcp_and_its_link_decides(checkpoints: list[Path]) -> None:
    spec = "tp=2,instances=3,hosts=3,holders=1"
    data = _json("--checkpoint", str(checkpoints[0]), "--simulate", spec, "--gb-per-s", "2")
    ways = [(w["instance"], w["transport"]) for w in data["workers"] if w["rank"] == 0]
    assert ways == [("instance-0", "memory"), ("instance-1", "tcp"), ("instance-2", "tcp")]
    far = sum(w["bytes"] for w in data["workers"] if w["transport"] == "tcp")
    assert data["predicted_s"] == pytest.approx(far / 2e9)


def test_the_table_joins_workers_that_do_the_same(checkpoints: list[Path]) -> None:
    text = _invoke("--checkpoint", str(checkpoints[0]), "--simulate", "tp=2,instances=8", "--gb-per-s", "10")
    assert "workers: 16, holders: 1" in text
    assert "instance-0[0] and" in text
    assert "direct (memory): all its bytes lie in memory of its host" in text
    assert "at 10 GB/s per link" in text


def test_route_and_budget_are_those_of_an_update(checkpoints: list[Path]) -> None:
    common = ("--checkpoint", str(checkpoints[0]), "--simulate", "tp=1")
    data = _json(*common, "--transport", "tcp", "--budget-gib", "0.0001", "--bucket-mib", "0.05")
    assert data["workers"][0]["transport"] == "tcp"
    assert data["workers"][0]["ring"].startswith("overlapped")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--simulate", "tp=3"], "tp=3 does not divide"),
        (["--simulate", "instances=2"], "needs tp=N"),
        (["--simulate", "tp=0"], "cannot use 'tp=0'"),
        (["--simulate", "tp=1,racks=2"], "cannot use 'racks=2'"),
        (["--simulate", "tp=1", "--gb-per-s", "0"], "must be above 0"),
        (["--simulate", "tp=1", "--holders", "2"], "holders=N"),
        (["--simulate", "tp=1", "--transport", "foo"], "choose one of auto, collective, memory, mooncake, tcp"),
        (["--to", "torch=http://127.0.0.1:1", "--transport", "foo", "--ready-s", "0.1"], "transport is 'foo'"),
        (["--simulate", "tp=1", "--bucket-mib", "nan"], "--bucket-mib is nan; give MiB"),
        (["--simulate", "tp=1", "--bucket-mib", "inf"], "--bucket-mib is inf; give MiB"),
        (["--simulate", "tp=1", "--budget-gib", "-1"], "--budget-gib is -1.0; give GiB"),
        ([], "either engines with --to, or a cluster"),
    ],
)
def test_what_makes_no_sense_is_refused(checkpoints: list[Path], args: list[str], text: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["plan", "--checkpoint", str(checkpoints[0]), *args]
    )
    assert result.exit_code == 1
    assert text in result.stderr


def test_instances_and_holders_are_spread_over_hosts() -> None:
    cluster = Cluster.parse("tp=8, instances=4, hosts=2, holders=3")
    assert cluster == Cluster(tp=8, instances=4, hosts=2, holders=3)
    assert [cluster.host_of_instance(i) for i in range(4)] == [0, 0, 1, 1]
    assert [cluster.host_of_holder(i) for i in range(3)] == [0, 0, 1]
    with pytest.raises(ConfigError):
        Cluster.parse("tp=1,tp=2")


# ---- real


@pytest.fixture(scope="module")
def engine(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with EngineProcess(checkpoints[0], 2, log=log) as process:
        yield process


def test_a_plan_leaves_the_engine_as_it_was_and_an_update_follows_it(
    checkpoints: list[Path], engine: EngineProcess
) -> None:
    before = engine.get("/headrace/fingerprints")
    with ParameterServer(checkpoints[1]) as server:
        planned = server.plan(engine.target, UpdateSettings(route="broadcast"))
        again = server.plan(engine.target)
        assert engine.get("/headrace/fingerprints") == before
        status = engine.get("/headrace/status")
        assert (status["weight_version"], status["paused"]) == (0, False)
        assert {rank["weights_state"] for rank in status["ranks"]} == {"old"}
        assert {rank["epoch"] for rank in status["ranks"]} == {0}
        report = server.update(engine.target)
    assert (planned.version, again.version, report.version) == (1, 1, 1)
    assert {w.route for w in planned.workers} == {"broadcast"}
    assert all(sum(w.from_holders.values()) == w.num_bytes for w in (*planned.workers, *again.workers))
    assert [(w.route, w.num_bytes, w.live_bytes, w.why) for w in again.workers] == [
        (w.route, w.num_bytes, w.live_bytes, w.why) for w in report.workers
    ]


def test_the_command_plans_for_a_running_engine(checkpoints: list[Path], engine: EngineProcess) -> None:
    served = engine.get("/headrace/status")["weight_version"]
    data = _json("--checkpoint", str(checkpoints[1]), "--to", engine.target, "--holders", "2")
    assert data["version"] == served + 1
    assert [w["rank"] for w in data["workers"]] == [0, 1]
    assert len(data["holders"]) == 2
    assert engine.get("/headrace/status")["weight_version"] == served


def test_an_update_over_a_transport_that_nobody_knows_reads_nothing(checkpoints: list[Path]) -> None:
    with ParameterServer(checkpoints[0]) as server:
        with pytest.raises(ConfigError, match="transport is 'foo'"):
            server.update("torch=http://127.0.0.1:1", transport="foo")
        assert not server.holders.addresses


def test_a_source_that_does_not_fit_is_told_without_a_pause(engine: EngineProcess, tmp_path: Path) -> None:
    other = make_tiny_qwen3(tmp_path / "other", 1, size=TinySize(hidden=96, num_heads=6))
    before = engine.get("/headrace/fingerprints")
    for attempt in ("plan", "update"):
        with ParameterServer(other) as server, pytest.raises(UpdateFailedError) as caught:
            getattr(server, attempt)(engine.target)
        assert caught.value.weights_state == "old"
        assert {f.type_name for f in caught.value.failures.values()} == {"ManifestMismatchError"}
        assert "lm_head.weight is float32 (440, 96), the engine's checkpoint has float32 (440, 64)" in str(caught.value)
    assert engine.get("/health")["paused"] is False
    assert engine.get("/headrace/fingerprints") == before
