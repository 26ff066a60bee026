"""Options that commands share; foremost those that name engines and say how to reach them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.config import GIB, MIB, EngineTarget, size_bytes
from headrace.errors import ConfigError

ToOption = typer.Option("--to", help="Engine as NAME=URL, e.g. torch=http://127.0.0.1:8000; repeatable.")
To = Annotated[list[str], ToOption]
Headers = Annotated[
    list[str] | None,
    typer.Option(
        "--header",
        help="Sent to every engine: 'NAME: VALUE', or @FILE with one per line, which keeps keys out of "
        "the process list; repeatable.",
    ),
]
Ca = Annotated[
    Path | None, typer.Option("--ca", help="Authority that engines' certificates are checked against, PEM.")
]
Certificate = Annotated[
    Path | None,
    typer.Option("--cert", help="This client's certificate and key, PEM, where engines ask for one."),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Do not check engines' certificates.")]

Checkpoint = Annotated[Path, typer.Option(help="Folder or file of safetensors.")]
Route = Annotated[str, typer.Option(help="auto, direct or broadcast.")]
Transport = Annotated[str, typer.Option(help="auto, memory, tcp, collective, or one that is installed.")]
Cache = Annotated[str, typer.Option(help="recompute: drop KV of the old weights; keep: keep it.")]
Barrier = Annotated[
    str,
    typer.Option(help="pause: the engine's own; hold: inside one call to its workers; auto: hold where it can be."),
]
Verify = Annotated[str, typer.Option(help="none, digest or full.")]
Version = Annotated[int | None, typer.Option(help="Version to serve; default: the greatest served plus one.")]
Rolling = Annotated[
    bool, typer.Option("--rolling", help="Pause engines one after another, so that the fleet never stops.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse source names that nothing uses.")]
Holders = Annotated[
    int | None, typer.Option(min=1, help="Holder processes; default 1, for broadcast 1 per worker.")
]
BudgetGib = Annotated[
    float | None, typer.Option(help="Most staging memory per worker; default: what is free.")
]
BucketMib = Annotated[float, typer.Option(help="Size of one bucket.")]
ReadyS = Annotated[float, typer.Option(help="How long to wait for an engine that is not up yet.")]
Trace = Annotated[Path | None, typer.Option(help="Write Chrome trace events (Perfetto).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
ReportFile = Annotated[Path | None, typer.Option(help="Write the report as JSON.")]


def unchecked(value: str) -> Any:  # noqa: ANN401 - UpdateSettings checks it and says what is allowed
    """Return an option that takes one of a few words, for a field whose type is those words."""
    return value


def budget_bytes(budget_gib: float | None) -> int | None:
    """Return `--budget-gib` in bytes; None where it is not given.

    Raises:
        ConfigError: It is no size.
    """
    return None if budget_gib is None else size_bytes(budget_gib, GIB, "--budget-gib")


def bucket_bytes(bucket_mib: float) -> int:
    """Return `--bucket-mib` in bytes.

    Raises:
        ConfigError: It is no size.
    """
    return size_bytes(bucket_mib, MIB, "--bucket-mib")


def engine_targets(
    to: Sequence[str],
    headers: Sequence[str] | None,
    ca: Path | None,
    certificate: Path | None,
    insecure: bool,
) -> list[EngineTarget]:
    """Return what the options name, every engine with the same headers and certificates.

    Raises:
        ConfigError: A header has no name, a file cannot be read, or options contradict each other.
    """
    if insecure and ca is not None:
        raise ConfigError("--ca and --insecure contradict each other; give one", name="--insecure")
    sent = dict(_header(line) for given in headers or () for line in _lines(given))
    verify = str(ca) if ca is not None else not insecure
    return [EngineTarget(address, sent, verify, str(certificate) if certificate else None) for address in to]


def _lines(given: str) -> list[str]:
    if not given.startswith("@"):
        return [given]
    try:
        text = Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--header {given}: the file cannot be read: {error}", name=given) from error
    return [line for line in text.splitlines() if line.strip()]


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or not name.strip() or not value.strip():
        message = "a --header has no name and value; write 'NAME: VALUE', e.g. 'Authorization: Bearer KEY'"
        raise ConfigError(message, name="--header")
    if not line.isascii():
        raise ConfigError(f"the --header {name.strip()!r} is not plain ASCII", name="--header")
    return name.strip(), value.strip()
