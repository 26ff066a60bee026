"""What the demo found, for people (a table, an excerpt, check marks) and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headrace.cli.console import format_bytes, format_seconds, stdout
from headrace.cli.render import report_json

if TYPE_CHECKING:
    from headrace.demo.story import DemoSettings, Outcome
    from headrace.demo.streams import StreamedRequest

LEAST_WIDTH = 130
EXCERPT_TOKENS = 14
_LEFT = ("version", "source", "route")
_RIGHT = ("per worker", "stage", "stall", "total", "GB/s", "of memcpy", "longest gap", "usual")


def outcome_json(outcome: Outcome, settings: DemoSettings) -> dict[str, object]:
    """Return what the demo found as plain data; `headrace.cli.demo` tells the keys."""
    ceiling = outcome.ceiling
    return {
        "ok": outcome.ok,
        "seconds": outcome.seconds,
        "settings": asdict(settings),
        "model_bytes": outcome.model_bytes,
        "usual_gap_s": outcome.usual_gap_s,
        "ceiling": None if ceiling is None else asdict(ceiling) | {"gb_per_s": ceiling.gb_per_s},
        "updates": [
            report_json(update.report, _memcpy(outcome))
            | {
                "source": update.source,
                "asked_route": update.route,
                "longest_gap_s": gap_s,
                "losses": update.losses,
                "differences": update.differences,
            }
            for update, gap_s in zip(outcome.updates, outcome.longest_gap_s, strict=True)
        ],
        "requests": {
            "num": len(outcome.requests),
            "tokens": sum(len(request.tokens) for request in outcome.requests),
            "across_updates": sum(bool(request.version_starts) for request in outcome.requests),
        },
        "proofs": {
            proof.name: {
                "ok": proof.ok,
                "claim": proof.claim,
                "problems": proof.problems,
                "details": proof.details,
            }
            for proof in outcome.proofs
        },
        "excerpt": excerpt(outcome.requests),
    }


def print_outcome(outcome: Outcome) -> None:
    """Print the table, an excerpt and the proofs."""
    console = stdout()
    if not console.is_terminal:
        console.width = max(console.width, LEAST_WIDTH)
    console.print(outcome_table(outcome))
    for line in _notes(outcome):
        console.print(line, markup=False, soft_wrap=True)
    _print_excerpt(console, outcome)
    console.print()
    for proof in outcome.proofs:
        mark = "[bold green]✓[/]" if proof.ok else "[bold red]✗[/]"
        console.print(f"{mark} {escape(proof.claim)}", soft_wrap=True)
        for problem in proof.problems[:10]:
            console.print(f"    {problem}", style="red", markup=False, soft_wrap=True)


def outcome_table(outcome: Outcome) -> Table:
    """Return one row per update, the first one apart."""
    title = (
        f"{len(outcome.updates)} updates of a {format_bytes(outcome.model_bytes)} model under load; the first "
        "one, which records and proves how the engine loads its weights, stands apart.\n"
        "Gap: time between two tokens of one request, the longest during the update and the usual one."
    )
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for heading in _LEFT:
        table.add_column(heading)
    for heading in _RIGHT:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, cells in enumerate(_rows(outcome)):
        table.add_row(*cells, end_section=row == 0)
    return table


def _rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    for update, gap_s in zip(outcome.updates, outcome.longest_gap_s, strict=True):
        report = update.report
        share = report.gb_per_s / memcpy if (memcpy := _memcpy(outcome)) else None
        yield (
            str(report.version),
            update.source,
            ", ".join(dict.fromkeys(w.route for w in report.workers)),
            format_bytes(max(w.live_bytes for w in report.workers)),
            *map(format_seconds, (report.stage_s, report.stall_s, report.total_s)),
            f"{report.gb_per_s:.2f}",
            "" if share is None else f"{share:.0%}",
            format_seconds(gap_s),
            format_seconds(outcome.usual_gap_s),
        )


def _memcpy(outcome: Outcome) -> float | None:
    return outcome.ceiling.gb_per_s if outcome.ceiling else None


def _notes(outcome: Outcome) -> Iterator[str]:
    later = [update.report for update in outcome.updates[1:]]
    if later:
        stall, total = median(r.stall_s for r in later), median(r.total_s for r in later)
        yield f"median of the following ones: stall {format_seconds(stall)}, total {format_seconds(total)}"
    yield "total holds the start of holder processes where a source is used for the first time"
    if outcome.ceiling is not None:
        yield (
            f"memory-copy ceiling of this run: {outcome.ceiling.gb_per_s:.2f} GB/s, "
            f"{outcome.ceiling.num_processes} processes at once, {format_bytes(outcome.ceiling.bytes_each)} each"
        )


def excerpt(requests: Sequence[StreamedRequest]) -> dict[str, object] | None:
    """Return the text of one request on both sides of an update: where there is most of it, and the latest."""
    found = [(request, at) for request in requests for at in request.version_starts]
    if not found:
        return None

    def worth(one: tuple[StreamedRequest, int]) -> tuple[int, int]:
        request, at = one
        return min(at, len(request.tokens) - at, EXCERPT_TOKENS), request.versions[at] or 0

    request, at = max(found, key=worth)
    begin = max(0, at - EXCERPT_TOKENS)
    prompt = request.prompt.text if begin == 0 else "... "
    return {
        "versions": [request.versions[at - 1], request.versions[at]],
        "before": prompt + "".join(request.texts[begin:at]),
        "after": "".join(request.texts[at : at + EXCERPT_TOKENS]) + " ...",
    }


def _print_excerpt(console: Console, outcome: Outcome) -> None:
    found = excerpt(outcome.requests)
    if found is None:
        return
    old, new = cast("list[int]", found["versions"])
    before, after = escape(str(found["before"])), escape(str(found["after"]))
    console.print("\none request changes its mind in mid-sentence:")
    console.print(
        f"  [dim]{before}[/] [bold yellow]▏version {old} → {new}▕[/] [green]{after}[/]", soft_wrap=True
    )
