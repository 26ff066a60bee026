"""Runs every benchmark; with `--write PAGE` the tables between a page's markers are replaced.

Run as `python -m benchmarks.all --write docs/benchmarks.md`. About ten minutes and 8 GB of memory; other work on the
machine shows in the numbers, so each series of updates waits up to a minute for a quiet moment.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from rich.console import Console

from benchmarks import control, direct, planning, routes
from benchmarks._common import Section, machine, wait_for_quiet

BENCHMARKS = {
    "direct": direct.sections,
    "control": control.sections,
    "routes": routes.sections,
    "planning": planning.sections,
}


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="replace the tables between this page's markers"
    )
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+", default=list(BENCHMARKS), metavar="NAME")
    chosen = parser.parse_args()
    for name in chosen.only:
        wait_for_quiet()
        for section in BENCHMARKS[name]():
            report(section, chosen.write)
    report(machine(), chosen.write)


def report(section: Section, page: Path | None) -> None:
    """Print a table, and write it into the page at once: a run of minutes may end early."""
    section.show(Console(width=160))
    if page is not None:
        page.write_text(replaced(page.read_text(encoding="utf-8"), section), encoding="utf-8")


def replaced(page: str, section: Section) -> str:
    """Return the page with a new table between `<!-- measured: NAME -->` and `<!-- end: NAME -->`.

    Raises:
        SystemExit: The page has no such markers, or several.
    """
    begin, end = f"<!-- measured: {section.name} -->", f"<!-- end: {section.name} -->"
    new = f"{begin}\n\n{section.markdown()}\n\n{end}"
    page, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: new, page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"the page has {count} places {begin} ... {end}; it must have one")
    return page


if __name__ == "__main__":
    main()
