"""`headrace engine`: the embedded torch engine as a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(engine)


def engine(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")],
    tp: Annotated[int, typer.Option(min=1, help="Worker processes (tensor parallel).")] = 1,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto takes the model's own.")] = "auto",
    load_format: Annotated[
        str, typer.Option(help="auto, or dummy: random weights, paused until the first update.")
    ] = "auto",
) -> None:
    """Serve a model with /v1/completions; its weights can be updated while it serves."""
    from headrace.embedded.server import serve
    from headrace.embedded.settings import EngineSettings

    serve(
        EngineSettings(
            model=model,
            tp=tp,
            host=host,
            port=port,
            device=_any(device),
            dtype=dtype,
            load_format=_any(load_format),
        )
    )


def _any(value: str) -> Any:  # noqa: ANN401 - EngineSettings checks it and says what is allowed
    return value
