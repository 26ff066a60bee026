"""`headrace join`: brings the version that others hold into engines of this host."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.console import format_bytes, format_seconds, print_json, stdout
from headrace.cli.files import check_writable, write_json
from headrace.cli.hold import stay
from headrace.cli.members import FromOptions, invitation_of, with_cpus, with_nics
from headrace.cli.options import (
    AsJson,
    BudgetGib,
    Ca,
    Certificate,
    Headers,
    Insecure,
    ReadyS,
    ReportFile,
    To,
    budget_bytes,
    engine_targets,
)
from headrace.cli.render import print_report, report_json
from headrace.config import Deadlines, UpdateSettings, host_settings

if TYPE_CHECKING:
    from headrace.server.joining import JoinReport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(join)


def join(
    to: To,
    keeper: FromOptions.From = None,
    token: FromOptions.Token = None,
    load_metas: FromOptions.Metas = None,
    transport: Annotated[
        str, typer.Option(help="auto, memory, tcp or mooncake: how holders are read.")
    ] = "auto",
    version: Annotated[
        int | None, typer.Option(help="Version to join; default: the newest that is held.")
    ] = None,
    nics: FromOptions.Nics = None,
    mooncake_cpus: FromOptions.MooncakeCpus = None,
    budget_gib: BudgetGib = None,
    ready_s: ReadyS = 600.0,
    keep_held: Annotated[
        bool, typer.Option("--keep-held", help="Afterwards stay, and give to others what was read.")
    ] = False,
    report: ReportFile = None,
    header: Headers = None,
    ca: Ca = None,
    cert: Certificate = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Bring the version that others hold into new engines of this host; nobody who serves is disturbed."""
    from headrace.cli.progress import UpdateProgress
    from headrace.server.joining import JoinSettings, joined

    invitation = invitation_of(keeper, token, load_metas)
    update = UpdateSettings(
        version=version,
        budget_bytes=budget_bytes(budget_gib),
        deadlines=Deadlines(ready_s=ready_s),
    )
    settings = JoinSettings(update=update, transport=transport)
    targets = engine_targets(to, header, ca, cert, insecure)
    host = with_cpus(with_nics(host_settings(), nics, transport), mooncake_cpus)
    check_writable(report, "--report")
    with ExitStack() as stack:
        with UpdateProgress("join") as progress:
            context = joined(invitation, targets, host, settings=settings, progress=progress)
            made, server = stack.enter_context(context)
        _show(made, as_json=as_json)
        write_json(report, join_json(made), indent=2)
        if keep_held:
            stay(server, "what was joined", [invitation], as_json=as_json)


def join_json(made: JoinReport) -> dict[str, object]:
    """Return a join as plain data: the update's report, and `join` with who gave what by which transport."""
    facts = {
        "from_holders": dict(made.from_holders),
        "transports": dict(made.transports),
        "seconds": dict(made.seconds),
        "attempts": made.attempts,
    }
    return {**report_json(made.update), "join": facts}


def _show(made: JoinReport, *, as_json: bool) -> None:
    if as_json:
        print_json(join_json(made))
        return
    console = stdout()
    print_report(console, made.update)
    for name, given in sorted(made.from_holders.items()):
        console.print(f"{format_bytes(given)} from {name} over {made.transports[name]}", markup=False)
    total, read_s = sum(made.from_holders.values()), made.seconds.get("read", 0.0)
    took = ", ".join(f"{what} {format_seconds(seconds)}" for what, seconds in made.seconds.items())
    console.print(f"{took}; {total / read_s / 1e9 if read_s else 0.0:.3g} GB/s while reading", markup=False)
