"""Options by which commands name a keeper."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.console import show_warning
from headrace.config import HostSettings, cpu_set
from headrace.errors import ConfigError
from headrace.server.invitation import TOKEN_VARIABLE, Invitation

_NCCL = "NCCL_IB_HCA"


class FromOptions:
    """Types of the options, equal in all commands."""

    From = Annotated[str | None, typer.Option("--from", help="Keeper's address, HOST:PORT.")]
    Of = Annotated[str | None, typer.Option("--of", help="Keeper's address, HOST:PORT.")]
    Partner = Annotated[
        list[Path] | None,
        typer.Option("--with", help="Metas file of another keeper of the same source; repeatable."),
    ]
    Token = Annotated[
        str | None,
        typer.Option(
            help="Keeper's token, or @FILE that has it, which keeps it out of the process list.",
            envvar=TOKEN_VARIABLE,
        ),
    ]
    Nics = Annotated[
        str | None,
        typer.Option(
            help="RDMA devices for Mooncake, as NCCL_IB_HCA names them; `tcp` for none; default: those of NCCL_IB_HCA, "
            "or all that are up.",
        ),
    ]
    MooncakeCpus = Annotated[
        str | None,
        typer.Option(help="CPUs of Mooncake's helper process, as `taskset -c` names them: keeps it off an engine's."),
    ]
    Metas = Annotated[Path | None, typer.Option("--load-metas", help="File that `hold --save-metas` wrote.")]


def invitation_of(address: str | None, token: str | None, metas: Path | None) -> Invitation:
    """Return the keeper that the options name.

    Raises:
        ConfigError: They name none, or two, or are malformed.
    """
    if metas is not None:
        if address or token:
            raise ConfigError("give either a metas file, or address and token", name="--load-metas")
        return Invitation.load(metas)
    if not address or not token:
        message = f"a keeper is reached with its address and its token (option or {TOKEN_VARIABLE}), or a metas file"
        raise ConfigError(message, name="--from")
    if token.startswith("@"):
        try:
            token = Path(token[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token {token}: the file cannot be read: {error}", name="--token") from error
    return Invitation.of(address, token)


def with_cpus(host: HostSettings, cpus: str | None) -> HostSettings:
    """Return the settings with the CPUs of Mooncake's helper processes; as they are where none are given.

    Raises:
        ConfigError: The list is malformed, or names none that this process may use.
    """
    return host if cpus is None else replace(host, mooncake_cpus=cpu_set(cpus, "--mooncake-cpus"))


def with_nics(host: HostSettings, pattern: str | None, transport: str) -> HostSettings:
    """Return the settings with the RDMA devices for Mooncake; as they are, so for TCP, where it is not used.

    Without an option NCCL_IB_HCA counts, which is often set for a whole cluster: where it names nothing that is here,
    Mooncake uses TCP, with a warning. With neither it is every device that is up.

    Args:
        host: The settings.
        pattern: What `--nics` says, if anything.
        transport: What `--transport` says.

    Raises:
        ConfigError: The option names nothing that is there and up.
    """
    from headrace.transports.mooncake_engine import missing
    from headrace.transports.nics import rdma_devices, select

    if transport not in ("auto", "mooncake") or (transport == "auto" and missing()):
        return host
    wished = os.environ.get(_NCCL, "") if pattern is None else pattern
    devices = rdma_devices()
    if wished == "tcp" or (not wished and not any(device.active for device in devices)):
        return host
    try:
        names = dict.fromkeys(device.name for device in select(devices, wished))
    except ConfigError as error:
        if pattern is not None:
            raise ConfigError(f"--nics: {error}; --nics tcp uses none", name="--nics") from error
        show_warning(f"{_NCCL}: {error}; Mooncake uses TCP (--nics chooses others)")
        return host
    return replace(host, mooncake_nics=tuple(names))
