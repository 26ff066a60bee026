"""The memory-copy ceiling: what this host gives when as many processes as an engine has workers copy at once.

Each process copies its own part of one shared segment into private memory whose pages are there already, by the
same call as a commit on the CPU. Rounds repeat over the same memory: what fits into a cache is copied from there, as
it is in a commit, whose bytes a holder has only just written.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from headrace.errors import ConfigError, PeerLostError, RemoteProtocolError, TransferTimeoutError
from headrace.manifest import SegmentDescriptor
from headrace.segments.host import HostSegment, MappedSegment
from headrace.segments.pages import make_pages

_AHEAD_S = 0.03
_SPIN_S = 0.002
_SLOWEST_BYTES_PER_S = 0.5e9


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyCeiling:
    """What was measured.

    Attributes:
        num_processes: How many copied at once.
        bytes_each: What each of them copied in a round.
        rounds_s: Seconds of the slowest process, per round.
    """

    num_processes: int
    bytes_each: int
    rounds_s: tuple[float, ...]

    @property
    def gb_per_s(self) -> float:
        """Bytes of all processes over the median round, in 1e9 bytes per second."""
        return self.num_processes * self.bytes_each / median(self.rounds_s) / 1e9


def measure_copy_ceiling(
    num_processes: int, bytes_each: int, *, rounds: int = 15, deadline_s: float = 60.0
) -> CopyCeiling:
    """Have `num_processes` processes copy `bytes_each` bytes at the same moments. Blocking.

    Raises:
        ConfigError: There is nothing to copy.
        CapacityError: The segment does not fit into memory.
        PeerLostError: A process ended early.
        TransferTimeoutError: They did not finish within the deadline; none is left behind.
    """
    if num_processes < 1 or bytes_each < 1 or rounds < 1:
        message = f"{num_processes} processes, {bytes_each} bytes, {rounds} rounds: each must be at least 1"
        raise ConfigError(message, name="ceiling")
    limit = time.monotonic() + deadline_s
    with HostSegment(num_processes * bytes_each, "headrace-ceiling") as segment:
        make_pages(segment.tensor)
        segment.tensor.random_(0, 256)
        processes = [_start(segment, number, bytes_each) for number in range(num_processes)]
        try:
            seconds = _run(processes, rounds, bytes_each, limit)
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    slowest = tuple(max(each) for each in zip(*seconds, strict=True))
    return CopyCeiling(num_processes=num_processes, bytes_each=bytes_each, rounds_s=slowest)


def _start(segment: HostSegment, number: int, bytes_each: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "headrace.ceiling"]
    spec = {
        "fd": segment.fd,
        "segment_id": segment.descriptor.segment_id,
        "num_bytes": segment.descriptor.num_bytes,
        "begin": number * bytes_each,
        "end": (number + 1) * bytes_each,
    }
    return subprocess.Popen(
        [*command, json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[segment.fd],
    )


def _run(
    processes: Sequence[subprocess.Popen[bytes]], rounds: int, bytes_each: int, limit: float
) -> list[list[float]]:
    """Name the moments of all rounds once every process is ready, and collect what each measured."""
    for process in processes:
        _await_ready(process, limit)
    step = _AHEAD_S + bytes_each * len(processes) / _SLOWEST_BYTES_PER_S
    begin = time.monotonic() + _AHEAD_S
    moments = json.dumps([begin + step * number for number in range(rounds)]).encode() + b"\n"
    for process in processes:
        if process.stdin is not None:
            process.stdin.write(moments)
            process.stdin.flush()
    return [_seconds(process, rounds, limit) for process in processes]


def _await_ready(process: subprocess.Popen[bytes], limit: float) -> None:
    if process.stdout is None:
        raise PeerLostError("a copying process was started without a pipe")
    if not select.select([process.stdout], [], [], max(0.0, limit - time.monotonic()))[0]:
        raise TransferTimeoutError("a copying process was not ready in time; is the machine overloaded?")
    if not process.stdout.readline():
        raise PeerLostError(f"a copying process left with exit code {process.wait()} before it was ready")


def _seconds(process: subprocess.Popen[bytes], rounds: int, limit: float) -> list[float]:
    try:
        answer, _ = process.communicate(timeout=max(0.0, limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TransferTimeoutError("a copying process did not finish in time") from None
    try:
        seconds = [float(value) for value in json.loads(answer)]
    except (TypeError, ValueError) as error:
        message = f"a copying process answered {answer[:100]!r}, exit code {process.returncode}"
        raise PeerLostError(message) from error
    if len(seconds) != rounds:
        raise RemoteProtocolError(f"a copying process answered {len(seconds)} rounds of {rounds}")
    return seconds


def main(argument: str) -> None:
    """Copy at the moments that stdin names, and write the seconds of each copy."""
    spec = json.loads(argument)
    torch.set_num_threads(1)
    mapped = MappedSegment(spec["fd"], SegmentDescriptor(spec["segment_id"], spec["num_bytes"]))
    mapped.populate()
    source = mapped.tensor[spec["begin"] : spec["end"]]
    target = source.clone()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    seconds = []
    for moment in json.loads(sys.stdin.readline() or "[]"):
        _sleep_until(moment)
        begin = time.monotonic()
        target.copy_(source)
        seconds.append(time.monotonic() - begin)
    sys.stdout.write(json.dumps(seconds))


def _sleep_until(moment: float) -> None:
    """Sleep, and spin for the last moment: a wake-up alone would be as long as the copy."""
    time.sleep(max(0.0, moment - time.monotonic() - _SPIN_S))
    while time.monotonic() < moment:
        pass


if __name__ == "__main__":
    main(sys.argv[1])
