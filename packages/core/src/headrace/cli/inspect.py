"""`headrace inspect`: what a checkpoint holds, and whether its files fit together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.console import format_bytes, print_json, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from headrace.store.checkpoint import CheckpointSummary
    from headrace.types import ParamTable


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(inspect)


def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="A folder or a file of safetensors.", show_default=False)
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Tell what a checkpoint holds; headers are read and checked, weights are not."""
    from headrace.store.checkpoint import CheckpointSource

    with closing(CheckpointSource(checkpoint)) as source:
        summary, params = source.summary(), source.metadata()
    if as_json:
        print_json(summary_json(summary, params if tensors else None))
        return
    console = stdout()
    for key, value in _facts(summary):
        console.print(f"{key:<13}{value}", markup=False, soft_wrap=True)
    console.print(_dtype_table(summary))
    if tensors:
        console.print(_tensor_table(params))


def summary_json(summary: CheckpointSummary, params: ParamTable | None = None) -> dict[str, object]:
    """Return a summary as plain data.

    Keys: `path`, `model_type`, `architectures`, `files` (name to bytes), `ignored` (files beside the
    checkpoint), `metadata`, `num_tensors`, `num_elements`, `bytes`, `dtypes` (name to `num_tensors` and
    `bytes`); with `params` also `tensors`: a list of `name`, `dtype`, `shape`, `bytes`.
    """
    data: dict[str, object] = {
        "path": summary.path,
        "model_type": summary.model_type,
        "architectures": list(summary.architectures),
        "files": dict(summary.files),
        "ignored": list(summary.ignored),
        "metadata": dict(summary.metadata),
        "num_tensors": summary.num_tensors,
        "num_elements": summary.num_elements,
        "bytes": summary.num_bytes,
        "dtypes": {
            dtype: {"num_tensors": count, "bytes": num_bytes}
            for dtype, (count, num_bytes) in summary.dtypes.items()
        },
    }
    if params is not None:
        data["tensors"] = [
            {"name": meta.name, "dtype": meta.dtype, "shape": list(meta.shape), "bytes": meta.num_bytes}
            for meta in params
        ]
    return data


def _facts(summary: CheckpointSummary) -> Iterator[tuple[str, str]]:
    yield "checkpoint", summary.path
    if summary.model_type or summary.architectures:
        yield "model", f"{summary.model_type or 'unknown type'} {', '.join(summary.architectures)}".rstrip()
    yield "tensors", f"{summary.num_tensors:,} with {summary.num_elements:,} elements"
    yield "bytes", f"{format_bytes(summary.num_bytes)} in {_counted(len(summary.files), 'file')}"
    for name, num_bytes in summary.files.items():
        yield "", f"{name} ({format_bytes(num_bytes)})"
    for name in summary.ignored:
        yield "ignored", f"{name}: it does not belong to the checkpoint"
    for key, value in summary.metadata.items():
        yield "metadata", f"{key}={value}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _dtype_table(summary: CheckpointSummary) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("dtype", no_wrap=True, min_width=12)
    table.add_column("tensors", justify="right")
    table.add_column("bytes", justify="right")
    for dtype, (count, num_bytes) in sorted(summary.dtypes.items()):
        table.add_row(dtype, f"{count:,}", format_bytes(num_bytes))
    return table


def _tensor_table(params: ParamTable) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for meta in params:
        shape = " x ".join(map(str, meta.shape)) or "scalar"
        table.add_row(meta.name, meta.dtype, shape, format_bytes(meta.num_bytes))
    return table
