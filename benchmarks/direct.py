"""How close a commit over `direct` comes to one plain copy of as many bytes, and what more tensors cost.

Run as `python -m benchmarks.direct`. Workers are real processes; the ceiling is measured between the updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks._ceiling import PlainCopy
from benchmarks._common import (
    REPEATS,
    WARM_UPS,
    Section,
    Spread,
    Step,
    commit_seconds,
    gb_per_s,
    print_sections,
    progress,
    wait_for_quiet,
)
from benchmarks._models import (
    DENSE,
    MOE,
    NUM_WORKERS,
    Model,
    change,
    checksum,
    expected_checksum,
    grown,
    make_tensors,
    worker_backend,
)
from headrace.report import UpdateReport
from headrace.server.parameter_server import ParameterServer
from headrace.testing.bare_engine import BareEngine

TARGET_SHARE = 0.80
TARGET_GROWTH = 0.25
GROWTH = (400, 1200, 2400, 4800)
VERIFY = ("none", "digest", "full")
COLUMNS = (
    "model", "tensors", "GB", "verify", "commit ms", "GB/s", "ceiling GB/s", "share", "stall ms", "total ms", "stage ms"
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What repeats of one update gave.

    Attributes:
        ceiling: Seconds of one plain copy of as many bytes.
        shares: Each update's rate over that of the plain copy right after it: what else the machine does in a
            minute meets both.
    """

    model: Model
    verify: str
    num_bytes: int
    commit: Spread
    ceiling: Spread
    stall: Spread
    total: Spread
    stage: Spread
    shares: Spread

    def row(self) -> tuple[str, ...]:
        """Return it as a row of `COLUMNS`."""
        return (
            self.model.name,
            f"{len(self.model.params()):,}",
            f"{self.num_bytes / 1e9:.2f}",
            self.verify,
            self.commit.ms(),
            gb_per_s(self.num_bytes, self.commit.median),
            gb_per_s(self.num_bytes, self.ceiling.median),
            f"{self.shares.median:.0%} ({self.shares.least:.0%}-{self.shares.greatest:.0%})",
            self.stall.ms(),
            self.total.ms(),
            self.stage.ms(),
        )


def measure(model: Model, modes: Sequence[str], repeats: int, step: Step) -> list[Result]:
    """Update workers of `model` again and again, once per verify mode and repeat, and measure the ceiling between.

    Raises:
        SystemExit: The workers do not hold the source's bytes in the end.
    """
    tensors = make_tensors(model)
    with (
        BareEngine(worker_backend, NUM_WORKERS, model, 4 << 30) as engine,
        ParameterServer(tensors=tensors) as server,
    ):
        server.update(engine.control, route="direct", verify="none")
        num_bytes = server.update(engine.control, route="direct", verify="none").num_bytes
        with PlainCopy(engine, num_bytes // NUM_WORKERS) as plain:
            results = [
                _measure_mode(model, mode, repeats, (engine, server, plain, tensors), step) for mode in modes
            ]
        for rank, found in enumerate(engine.call_all(checksum)):
            if found != expected_checksum(model, rank, tensors):
                raise SystemExit(f"{model.name}: worker {rank} does not hold the source's bytes")
    return results


def _measure_mode(
    model: Model,
    verify: str,
    repeats: int,
    parts: tuple[BareEngine, ParameterServer, PlainCopy, dict[str, torch.Tensor]],
    step: Step,
) -> Result:
    engine, server, plain, tensors = parts
    reports: list[UpdateReport] = []
    ceilings: list[float] = []
    wait_for_quiet()
    for _ in range(WARM_UPS + repeats):
        step(f"direct, {model.name}, verify {verify}")
        change(tensors)
        reports.append(server.update(engine.control, route="direct", verify=verify))
        ceilings.append(plain.seconds())
    kept = reports[WARM_UPS:]
    commits = [commit_seconds(report) for report in kept]
    return Result(
        model,
        verify,
        kept[0].num_bytes,
        commit=Spread.of(commits),
        ceiling=Spread.of(ceilings[WARM_UPS:]),
        stall=Spread.of([report.stall_s for report in kept]),
        total=Spread.of([report.total_s for report in kept]),
        stage=Spread.of([report.stage_s for report in kept]),
        shares=Spread.of(
            [plain / commit for plain, commit in zip(ceilings[WARM_UPS:], commits, strict=True)]
        ),
    )


def sections(repeats: int = REPEATS) -> list[Section]:
    """Measure everything."""
    per_mode = WARM_UPS + repeats
    with progress("direct", per_mode * (2 * len(VERIFY) + len(GROWTH))) as step:
        models = [result for model in (DENSE, MOE) for result in measure(model, VERIFY, repeats, step)]
        growth = [result for count in GROWTH for result in measure(grown(count), ("none",), repeats, step)]
    return [_models_section(models), _growth_section(growth)]


def _models_section(results: Sequence[Result]) -> Section:
    shares = ", ".join(f"{r.model.name} {r.shares.median:.0%}" for r in results if r.verify == "none")
    note = f"To reach: {TARGET_SHARE:.0%} of the ceiling with verify none. Reached: {shares}."
    title = f"direct, {NUM_WORKERS} workers on the CPU: median (least-greatest)"
    return Section("direct", title, COLUMNS, tuple(result.row() for result in results), (note,))


def _growth_section(results: Sequence[Result]) -> Section:
    grew = results[-1].commit.median / results[0].commit.median - 1
    beside = results[0].shares.median / results[-1].shares.median - 1
    note = (
        f"To reach: at most {TARGET_GROWTH:.0%} from the first row to the last. Reached: {beside:+.0%}, counted in "
        f"plain copies of the same minute ({grew:+.0%} in milliseconds, with what else the machine did meanwhile)."
    )
    return Section(
        "growth", "direct, equal bytes in more tensors", COLUMNS, tuple(r.row() for r in results), (note,)
    )


if __name__ == "__main__":
    print_sections(__doc__, sections, REPEATS)
