"""`headrace hold`: keeps a checkpoint in this host's memory for instances that join."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.console import format_bytes, print_json, stdout
from headrace.cli.files import check_writable
from headrace.cli.members import FromOptions, with_cpus, with_nics
from headrace.cli.options import Checkpoint
from headrace.config import MAX_PORT, advertised, host_settings
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.config import HostSettings
    from headrace.server.invitation import Invitation
    from headrace.server.keeping import Keeper
    from headrace.server.parameter_server import ParameterServer

_CHECK_EVERY_S = 1.0
_LOOPBACK = ("127.", "::1", "localhost")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(hold)


def hold(
    checkpoint: Checkpoint,
    version: Annotated[
        int | None, typer.Option(help="Number of the version; default: what partners hold, or 1.")
    ] = None,
    bind: Annotated[
        str | None, typer.Option(help="Address to listen on, HOST or HOST:PORT; default 127.0.0.1.")
    ] = None,
    advertise: Annotated[str | None, typer.Option(help="Address that others are told to dial.")] = None,
    transport: Annotated[
        str, typer.Option(help="tcp, or mooncake beside it (not encrypted, not authenticated).")
    ] = "tcp",
    allow_unauthenticated_data_plane: Annotated[
        bool, typer.Option(help="Run Mooncake where others than this host can reach it.")
    ] = False,
    nics: FromOptions.Nics = None,
    mooncake_cpus: FromOptions.MooncakeCpus = None,
    save_metas: Annotated[Path | None, typer.Option(help="Write how to join to this file.")] = None,
    partner: FromOptions.Partner = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print address and token as JSON.")] = False,
) -> None:
    """Keep a checkpoint in this host's memory; instances join from it with the address and token it prints."""
    from headrace.cli.progress import UpdateProgress
    from headrace.server.holders import SourceSpec
    from headrace.server.invitation import Invitation
    from headrace.server.keeping import keep
    from headrace.server.torchrun import hold_as_rank, launched_by_torchrun
    from headrace.store.checkpoint import CheckpointSource

    host = _host(bind, advertise, transport, allowed=allow_unauthenticated_data_plane)
    host = with_cpus(with_nics(host, nics, transport), mooncake_cpus)
    launch = launched_by_torchrun()
    if launch is not None and launch.rank > 0:
        hold_as_rank(launch, checkpoint, replace(host, bind_port=0))
        return
    check_writable(save_metas, "--save-metas")
    partners = [Invitation.load(path) for path in partner or ()]
    source = None if launch else CheckpointSource(checkpoint)
    spec = SourceSpec(source=source) if source else SourceSpec(checkpoint=str(checkpoint.resolve()))
    with ExitStack() as stack:
        if source is not None:
            stack.callback(source.close)
        with UpdateProgress() as progress:
            kept = keep(spec, host, crew=launch, version=version, partners=partners, progress=progress)
            keeper = stack.enter_context(kept)
        announce(keeper, str(checkpoint), save_metas, as_json=as_json)
        keep_until_stop(keeper)


def stay(server: ParameterServer, what: str, partners: Sequence[Invitation], *, as_json: bool) -> None:
    """Keep what an update or a join has left in its holders open to others, until this process is told to end."""
    from headrace.server.keeping import Keeper

    with Keeper(server.holders, host_settings(), partners) as own:
        own.offer(server.holders.published)
        announce(own, what, None, as_json=as_json)
        keep_until_stop(own)


def _host(bind: str | None, advertise: str | None, transport: str, *, allowed: bool) -> HostSettings:
    """Return this host's settings as the options change them.

    Raises:
        ConfigError: They contradict each other, open Mooncake to a network without being told to, or name no address
            that others can dial.
    """
    host = host_settings()
    if transport not in {"tcp", "mooncake"}:
        raise ConfigError(f"--transport is {transport!r}; choose tcp or mooncake", name="--transport")
    if bind is not None:
        address, _, port = bind.rpartition(":") if bind.count(":") == 1 else (bind, "", "0")
        if not address or not port.isdigit() or int(port) > MAX_PORT:
            raise ConfigError(f"--bind is {bind!r}; write HOST or HOST:PORT", name="--bind")
        host = replace(host, bind_host=address, bind_port=int(port), advertise_host=advertised(address))
    if advertise is not None:
        host = replace(host, advertise_host=advertise)
    if transport == "mooncake":
        host = replace(host, mooncake=True)
        if not host.bind_host.startswith(_LOOPBACK) and not allowed:
            message = (
                f"Mooncake authenticates nobody and listens on every interface: whoever reaches {host.bind_host} can "
                "read the weights. Fence its ports, then give --allow-unauthenticated-data-plane; or hold with tcp"
            )
            raise ConfigError(message, name="--transport")
    host.require_advertised()
    return host


def announce(keeper: Keeper, what: str, save_metas: Path | None, *, as_json: bool) -> None:
    """Print how to join, and write it to the metas file."""
    invitation = keeper.exchange.invitation
    standing = keeper.exchange.standing()
    held = [holder for holder in standing.holders if not holder.of_member]
    version, num_bytes = max(holder.version for holder in held), sum(holder.num_bytes for holder in held)
    facts: dict[str, object] = {"version": version, "bytes": num_bytes, "holders": [h.name for h in held]}
    if save_metas is not None:
        invitation.save(save_metas, facts)
    if as_json:
        print_json({"address": invitation.address, "token": invitation.secret, **facts})
        return
    console = stdout()
    console.print(f"holding version {version} of {what}, {format_bytes(num_bytes)}", markup=False)
    console.print(f"address {invitation.address}", markup=False)
    console.print(f"token   {invitation.secret}", markup=False, soft_wrap=True)
    console.print(
        f"join with: HEADRACE_TOKEN=<token> headrace join --from {invitation.address} --to ENGINE=URL",
        markup=False,
        soft_wrap=True,
    )


def keep_until_stop(keeper: Keeper) -> None:
    """Return when the user or the system asks this process to end.

    Raises:
        PeerLostError: A holder is lost: this keeper is of no use to anybody any more.
    """
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        while not stop.wait(_CHECK_EVERY_S):
            keeper.check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
