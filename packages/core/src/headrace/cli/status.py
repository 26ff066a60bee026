"""`headrace status`: who holds what, and who reads from whom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from headrace.cli.console import format_bytes, print_json, stdout
from headrace.cli.members import FromOptions, invitation_of

if TYPE_CHECKING:
    from rich.console import Group

    from headrace.server.membership import Membership
    from headrace.wire import MemberStanding, Standing


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(status)


def status(
    keeper: FromOptions.Of = None,
    token: FromOptions.Token = None,
    load_metas: FromOptions.Metas = None,
    live: Annotated[bool, typer.Option("--live", help="Look again until stopped.")] = False,
    every_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks with --live.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show holders, hosts, versions, instances, and who reads from whom now."""
    from rich.live import Live

    from headrace.server.membership import Membership

    with Membership(invitation_of(keeper, token, load_metas), "status") as member, suppress(KeyboardInterrupt):
        looks = _looks(member, every_s, live=live)
        if live and not as_json and stdout().is_terminal:
            with Live(standing_table(next(looks)), console=stdout(), refresh_per_second=4) as view:
                for standing in looks:
                    view.update(standing_table(standing))
        for standing in looks:
            if as_json:
                print_json(msgspec.to_builtins(standing))
            else:
                stdout().print(standing_table(standing))


def _looks(member: Membership, every_s: float, *, live: bool) -> Iterator[Standing]:
    """Yield what the keeper knows: once, or with `live` again and again."""
    yield member.standing()
    while live:
        time.sleep(every_s)
        yield member.standing()


def standing_table(standing: Standing) -> Group:
    """Return what a keeper knows as two tables."""
    from rich.console import Group
    from rich.table import Table

    holders = Table("holder", "host", "version", "bytes", "of", title="held")
    for holder in standing.holders:
        holders.add_row(
            holder.name,
            holder.host,
            str(holder.version),
            format_bytes(holder.num_bytes),
            holder.of_member or "this keeper",
        )
    members = Table("member", "reads", "from", "done", "brought up", title="members")
    for member in standing.members:
        members.add_row(member.name, *_doing(member), ", ".join(member.joined) or "-")
    return Group(holders, members)


def _doing(member: MemberStanding) -> tuple[str, str, str]:
    if member.version is None:
        return "-", "-", "-"
    given = "\n".join(f"{name}: {format_bytes(n)}" for name, n in sorted(member.from_holders.items()))
    done, total = sum(member.from_holders.values()), member.total_bytes
    share = f"{done / total:.0%} of {format_bytes(total)}" if total else "begins"
    return f"version {member.version}", given or "-", share
