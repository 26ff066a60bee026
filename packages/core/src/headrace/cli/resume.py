"""`headrace resume`: lets an engine go on whose updater died in the pause, if its weights are whole."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.console import show_error, stdout
from headrace.cli.options import Ca, Certificate, Headers, Insecure, To, engine_targets
from headrace.errors import HeadraceError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(resume)


def resume(
    to: To,
    deadline_s: Annotated[float, typer.Option(help="How long to wait for the engine's workers.")] = 60.0,
    header: Headers = None,
    ca: Ca = None,
    cert: Certificate = None,
    insecure: Insecure = False,
) -> None:
    """Resume engines that an updater left paused; one whose ranks hold different weights stays paused."""
    from headrace.config import check_seconds, host_settings
    from headrace.recovery import recover_all

    check_seconds(deadline_s, "--deadline-s")
    errors: list[HeadraceError] = []
    for _, outcome in recover_all(engine_targets(to, header, ca, cert, insecure), host_settings(), deadline_s):
        if isinstance(outcome, HeadraceError):
            errors.append(outcome)
        else:
            stdout().print(outcome, markup=False)
    for error in errors[1:]:
        show_error(error, debug=False)
    if errors:
        raise errors[0]
