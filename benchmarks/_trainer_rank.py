"""What a rank measures for `benchmarks.trainers`: steps with updates beside them and steps without, in turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from benchmarks._trainer import Trainer, join, make_trainer
from headrace.config import Deadlines, UpdateSettings
from headrace.protocols import SourceRegion
from headrace_trainers.hook import Hook
from headrace_trainers.settings import StepReport

EVERY = 2
_GATHERS = 2


@dataclass(frozen=True)
class Run:
    """What is to be measured.

    Attributes:
        framework: `fsdp2` or `zero3`.
        model: Folder with the model's configuration.
        url: The engine.
        engine_pids: Its processes.
        port: Where the ranks meet.
        pairs: Pairs of steps per round: one with nothing beside it, one beside an update.
        rounds: How often the hook is attached; after each, there are half as many steps without one.
        device: `cpu` or `cuda`.
        verify: Verification of the updates.
        saved: Where the usual way puts its file; empty leaves it out.
    """

    framework: str
    model: str
    url: str
    engine_pids: tuple[int, ...]
    port: int
    pairs: int
    rounds: int
    device: str
    verify: str
    saved: str


@dataclass(frozen=True)
class Step:
    """One optimizer step on this rank.

    Attributes:
        seconds: From its beginning to its end.
        held_s: Of these, how long the fence held it up.
        hook_cpu_s: Processor time of this process's threads that are not the trainer's.
        engine_cpu_s: Processor time of the engine's processes meanwhile.
        peak_bytes: Most memory that this process had resident meanwhile.
    """

    seconds: float
    held_s: float
    hook_cpu_s: float
    engine_cpu_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Served:
    """One update: seconds from its beginning to its end, and what of them reading and the engine's stall took."""

    total_s: float
    read_s: float
    stall_s: float


@dataclass
class Measured:
    """One rank's measurements.

    Attributes:
        without: Steps without a hook.
        idle: Steps with a hook that has nothing to do, each right before the one of `beside` with the same index.
        beside: Steps while an update goes on.
        updates: Those that began at the end of a step of `idle`, on rank 0.
        gather: Seconds of gathering all weights, the usual way.
        save: Seconds of writing them to a file, on rank 0.
        copy: Seconds of one plain copy of this rank's shard, cast to bfloat16, while the other ranks do the same.
        shard_bytes: Size of that copy.
        segment_bytes: What the hook's segments took.
        num_params: Parameters of the model.
    """

    without: list[Step] = field(default_factory=list)
    idle: list[Step] = field(default_factory=list)
    beside: list[Step] = field(default_factory=list)
    updates: list[Served] = field(default_factory=list)
    gather: list[float] = field(default_factory=list)
    save: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    shard_bytes: int = 0
    segment_bytes: int = 0
    num_params: int = 0


def measure(rank: int, world_size: int, run: Run) -> Measured:
    """Train, with and without a hook in turns, and the usual way."""
    join(rank, world_size, run.port, run.device)
    trainer = make_trainer(run.framework, Path(run.model), run.device)
    found = Measured(num_params=trainer.num_params)
    trainer.step()
    threads = _threads()  # the trainer's: there is no hook yet
    for _ in range(run.rounds):
        _with_hook(trainer, run, threads, found)
        found.without += [_step(trainer, run, threads) for _ in range(run.pairs // 2)]
    for _ in range(_GATHERS if run.saved else 0):
        _usual_way(trainer, run, found)
    return found


def _usual_way(trainer: Trainer, run: Run, found: Measured) -> None:
    """Gather everything; rank 0 writes the file that an engine then loads."""
    begin = time.monotonic()
    whole = trainer.gather()
    found.gather.append(time.monotonic() - begin)
    if dist.get_rank() == 0:
        found.save.append(_timed(lambda: save_file(dict(whole), run.saved)))
    dist.barrier()


def _with_hook(trainer: Trainer, run: Run, threads: Sequence[int], found: Measured) -> None:
    """Alternate: a step with nothing beside it, at whose end an update begins, and the step beside that update."""
    settings = UpdateSettings(verify=run.verify, deadlines=Deadlines(ready_s=30))  # type: ignore[arg-type]
    choices = {"to": f"torch={run.url}", "dtype": "bfloat16", "update": settings, "every": EVERY}
    reports: list[StepReport] = []
    with trainer.attach(mode="background", report=reports.append, **choices) as hook:
        trainer.step()
        if hook.step % EVERY == 0:
            trainer.step()
        hook.flush()  # has made the segments and recorded the recipe
        reports.clear()
        for _ in range(run.pairs):
            found.idle.append(_step(trainer, run, threads, hook))
            found.beside.append(_step(trainer, run, threads, hook))
        hook.flush()
        done = [report.update for report in reports if report.update][: run.pairs]
        found.updates += [Served(update.total_s, update.read_s, update.stall_s) for update in done]
        _memory(hook, trainer, found)


def _memory(hook: Hook, trainer: Trainer, found: Measured) -> None:
    source = hook._source
    own: list[SourceRegion] = [region for i, region in enumerate(source.regions()) if i not in source.aliases()]
    count = sum(region.box.num_elements for region in own)
    found.shard_bytes = count * torch.bfloat16.itemsize
    found.segment_bytes = _resident_bytes()
    shard, out = torch.ones(count, dtype=trainer.dtype), torch.empty(count, dtype=torch.bfloat16)
    out.copy_(shard)
    dist.barrier()
    found.copy += [_timed(lambda: out.copy_(shard)) for _ in range(3)]


def _resident_bytes() -> int:
    """Return how much memory the segments of this process really take."""
    links = [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    own = [os.fstat(int(link.name)) for link in links if "memfd:headrace" in str(link.readlink())]
    return 512 * sum({stat.st_ino: stat.st_blocks for stat in own}.values())


def _step(trainer: Trainer, run: Run, threads: Sequence[int], hook: Hook | None = None) -> Step:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    held_s, hook_s = (hook.held_s if hook else 0.0), _hook_seconds(threads)
    engine_s = _cpu_seconds(run.engine_pids)
    seconds = _timed(trainer.step)
    return Step(
        seconds=seconds,
        held_s=(hook.held_s if hook else 0.0) - held_s,
        hook_cpu_s=_hook_seconds(threads) - hook_s,
        engine_cpu_s=_cpu_seconds(run.engine_pids) - engine_s,
        peak_bytes=_peak_bytes(),
    )


def _threads() -> list[int]:
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]


def _hook_seconds(threads: Sequence[int]) -> float:
    """Return the processor time that this process has used so far outside of some threads."""
    files = (Path(f"/proc/self/task/{thread}/schedstat") for thread in threads)
    own = sum(int(file.read_text(encoding="ascii").split()[0]) for file in files if file.exists())
    return time.process_time() - own * 1e-9


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _cpu_seconds(pids: Sequence[int]) -> float:
    """Return the processor time that some processes have used so far."""
    fields = [Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def _timed(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.monotonic()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - begin
