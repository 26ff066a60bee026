"""UpdateReport as JSON and as a table."""

from __future__ import annotations

import io
import json

from rich.console import Console

from headrace.cli.render import print_report, report_json
from headrace.report import UpdateReport, WorkerReport
from headrace.types import WorkerId

WORKERS = tuple(
    WorkerReport(
        worker=WorkerId("engine-a", rank),
        route="direct",
        transport="memory",
        why="all bytes lie on this host",
        ring="no buffer needed",
        num_bytes=4_000_000_000,
        live_bytes=3_000_000_000,
        opaque_names=("model.norm.weight",) if rank == 0 else (),
        casts=("bfloat16->float32 (311 tensors)",),
        stage_s=0.25,
        commit_s=0.5 + rank,
        verify_s=0.125,
    )
    for rank in range(2)
)
REPORT = UpdateReport(
    update_id="u1",
    version=7,
    first=True,
    cache="recompute",
    verify="digest",
    workers=WORKERS,
    unused_names=tuple(f"mtp.{i}" for i in range(7)),
    read_s=1.0,
    plan_s=0.01,
    stage_s=0.25,
    stall_s=1.6,
    total_s=3.0,
    overhead_s=0.14,
)


def test_json_has_the_documented_keys_and_survives_a_round_trip() -> None:
    data = report_json(REPORT, memcpy_gb_per_s=8.0)
    assert json.loads(json.dumps(data)) == data
    assert (data["bytes"], data["live_bytes"]) == (8_000_000_000, 6_000_000_000)
    assert data["seconds"] == {
        "read": 1.0,
        "plan": 0.01,
        "stage": 0.25,
        "commit": 1.5,
        "stall": 1.6,
        "total": 3.0,
        "overhead": 0.14,
    }
    assert (data["gb_per_s"], data["share_of_memcpy"]) == (4.0, 0.5)
    workers = data["workers"]
    assert isinstance(workers, list)
    assert workers[1] == {
        "instance": "engine-a",
        "rank": 1,
        "route": "direct",
        "transport": "memory",
        "why": "all bytes lie on this host",
        "ring": "no buffer needed",
        "bytes": 4_000_000_000,
        "live_bytes": 3_000_000_000,
        "seconds": {"stage": 0.25, "commit": 1.5, "verify": 0.125},
        "casts": ["bfloat16->float32 (311 tensors)"],
        "opaque_names": [],
        "left_names": [],
    }
    documented = report_json.__doc__ or ""
    assert all(f"`{key}`" in documented for key in [*data, *workers[0]])


def test_without_a_ceiling_there_is_no_share() -> None:
    assert report_json(REPORT)["share_of_memcpy"] is None


def _printed(report: UpdateReport, memcpy_gb_per_s: float | None = None, width: int = 140) -> str:
    out = io.StringIO()
    print_report(Console(file=out, width=width), report, memcpy_gb_per_s)
    return out.getvalue()


def test_table_shows_workers_and_the_whole() -> None:
    text = _printed(REPORT, memcpy_gb_per_s=8.0)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "engine-a[1] direct (memory) 3.73 GiB 250 ms 1.5 s 2.00" in rows
    assert "all 7.45 GiB 250 ms 1.5 s 1.6 s 3 s 4.00 50%" in rows
    assert "version 7: cache recompute, verified by digest, first update" in text
    assert text.count("all bytes lie on this host") == 1
    assert "cast: bfloat16->float32 (311 tensors)" in text
    assert "unused names of the source: mtp.0, mtp.1, mtp.2, mtp.3, mtp.4 and 2 more" in text
    assert "through the engine's own loader: model.norm.weight" in text


def test_a_report_without_workers_is_printed() -> None:
    report = UpdateReport(update_id="u", version=0, first=False, cache="keep", verify="none", workers=())
    assert "0.00" in _printed(report)
