"""`headrace update`: brings a checkpoint's weights into running engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.console import print_json, stdout
from headrace.cli.files import check_writable, write_json
from headrace.cli.hold import stay
from headrace.cli.options import (
    AsJson,
    Barrier,
    BucketMib,
    BudgetGib,
    Ca,
    Cache,
    Certificate,
    Checkpoint,
    Headers,
    Holders,
    Insecure,
    ReadyS,
    ReportFile,
    Rolling,
    Route,
    Strict,
    To,
    Trace,
    Transport,
    Verify,
    Version,
    bucket_bytes,
    budget_bytes,
    engine_targets,
    unchecked,
)
from headrace.cli.render import print_report, report_json
from headrace.cli.serving import serving
from headrace.config import Deadlines, UpdateSettings
from headrace.telemetry import chrome_trace

if TYPE_CHECKING:
    from headrace.report import UpdateReport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(update)


def update(
    checkpoint: Checkpoint,
    to: To,
    route: Route = "auto",
    transport: Transport = "auto",
    cache: Cache = "recompute",
    barrier: Barrier = "auto",
    verify: Verify = "digest",
    version: Version = None,
    strict: Strict = False,
    rolling: Rolling = False,
    holders: Holders = None,
    budget_gib: BudgetGib = None,
    bucket_mib: BucketMib = 64.0,
    keep_held: Annotated[
        bool, typer.Option("--keep-held", help="Afterwards stay, and give the weights to instances that join.")
    ] = False,
    ready_s: ReadyS = 600.0,
    trace: Trace = None,
    report: ReportFile = None,
    header: Headers = None,
    ca: Ca = None,
    cert: Certificate = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Replace the weights of running engines by a checkpoint's, while they serve.

    Under torchrun every rank holds a part, and only rank 0 leads.
    """
    from headrace.cli.progress import UpdateProgress
    from headrace.server.torchrun import hold_as_rank, launched_by_torchrun

    settings = UpdateSettings(
        route=unchecked(route),
        transport=transport,
        cache=unchecked(cache),
        barrier=unchecked(barrier),
        verify=unchecked(verify),
        version=version,
        strict=strict,
        rolling=rolling,
        budget_bytes=budget_bytes(budget_gib),
        bucket_bytes=bucket_bytes(bucket_mib),
        deadlines=Deadlines(ready_s=ready_s),
    )
    targets = engine_targets(to, header, ca, cert, insecure)
    launch = launched_by_torchrun()
    if launch is not None and launch.rank > 0:
        hold_as_rank(launch, checkpoint)
        return
    check_writable(report, "--report")
    check_writable(trace, "--trace")
    with serving(checkpoint, holders, launch) as server:
        with UpdateProgress() as progress:
            made = server.update(targets, settings, progress=progress)
        _show(made, trace, report, as_json=as_json)
        if keep_held:
            stay(server, str(checkpoint), (), as_json=as_json)


def _show(made: UpdateReport, trace: Path | None, report: Path | None, *, as_json: bool) -> None:
    if as_json:
        print_json(report_json(made))
    else:
        print_report(stdout(), made)
    write_json(report, report_json(made), indent=2)
    write_json(trace, chrome_trace(made.spans))
