"""Reading a version from a keeper of this machine: Mooncake and TCP beside Mooncake's own large reads, and the disk.

`python -m benchmarks.p2p [GB]`; needs Mooncake (`nox -s p2p` installs it).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks import p2p_ceiling
from benchmarks._common import Section, Spread, gb_per_s
from headrace import wire
from headrace.config import HostSettings
from headrace.errors import PeerLostError
from headrace.mapping import HUGE_PAGE
from headrace.segments import HostSegment
from headrace.segments.pages import has_huge_pages, make_pages
from headrace.server.holders import SourceSpec
from headrace.server.joining import Ways
from headrace.server.keeping import keep
from headrace.server.membership import Membership
from headrace.server.reading import PeerSource
from headrace.store.checkpoint import CheckpointSource
from headrace.store.store import Store
from headrace.transports.mooncake_process import HelperProcess

BLOCK_BYTES = 64 << 20
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
REPEATS = 5


def make_checkpoint(folder: Path, num_bytes: int) -> Path:
    """Write matrices of 16 MB, as a 0.6B model in bf16 has them on average."""
    random = torch.Generator().manual_seed(3)
    shape = (2048, 4096)
    count = max(1, num_bytes // (2 * shape[0] * shape[1]))
    block = torch.randn(shape, generator=random).to(torch.bfloat16)
    save_file(
        {f"layer.{i}.weight": (block + i).contiguous() for i in range(count)}, folder / "model.safetensors"
    )
    return folder


def ceiling(offer: wire.Offer, host: HostSettings, *, fresh: bool) -> float:
    """Return GB/s of Mooncake's own blocking read of large blocks between two processes, nothing copied or checked.

    Args:
        offer: What is held.
        host: Where.
        fresh: Read every block to memory of its own, that nobody has touched, as a joiner's is; else all to one block.
    """
    manifest = offer.manifests[0]
    size = sum(segment.num_bytes for segment in manifest.segments) if fresh else BLOCK_BYTES
    memory = HostSegment(size + BLOCK_BYTES, "headrace-benchmark", peers_write=True)
    settings = {"host": host.advertise_host, "nics": [], "fd": memory.fd, "num_bytes": size + BLOCK_BYTES}
    # Helpers are started without the current folder on their path.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    helper = HelperProcess(p2p_ceiling.__name__, settings, pass_fds=[memory.fd])
    try:
        session = manifest.holder.mooncake
        places = helper.call({"session": session}, 30)["segments"]
        requests: list[dict[str, Any]] = []
        for segment in manifest.segments:
            address = int(places[segment.segment_id][0])
            for begin in range(0, segment.num_bytes - BLOCK_BYTES + 1, BLOCK_BYTES):
                to = (1 + len(requests)) * BLOCK_BYTES if fresh else 0
                requests.append({"session": session, "blocking": [to, address + begin, BLOCK_BYTES]})
        first = [0, *requests[0]["blocking"][1:]]
        helper.call({"session": session, "blocking": first}, 60)
        begin_s = time.monotonic()
        for request in requests:
            if helper.call(request, 60)["code"]:
                raise PeerLostError("Mooncake's own read failed", name=session)
        return len(requests) * BLOCK_BYTES / (time.monotonic() - begin_s) / 1e9
    finally:
        helper.close()
        memory.close()


@contextmanager
def own_connections() -> Iterator[None]:
    """Have helpers that start meanwhile connect as Mooncake does by default: anew for every transfer."""
    os.environ["MC_TCP_ENABLE_CONNECTION_POOL"] = "0"
    try:
        yield
    finally:
        del os.environ["MC_TCP_ENABLE_CONNECTION_POOL"]


def read(offer: wire.Offer, transport: str, host: HostSettings) -> dict[str, float]:
    """Return the seconds of one join's transfer, by phase, and as a whole."""
    begin_s = time.monotonic()
    ways = Ways(transport, host)
    source = PeerSource(offer, ways)
    try:
        with Store(source, "benchmark") as store:
            store.publish(1)
            total_s = time.monotonic() - begin_s
        return {**source.seconds, "whole": total_s}
    finally:
        ways.close()


def pages_setting() -> str:
    """Return what this kernel permits and what it gives: the setting for shared memory, and a segment's pages."""
    setting = SHMEM_ENABLED.read_text().partition("[")[2].partition("]")[0] if SHMEM_ENABLED.exists() else "none"
    with HostSegment(HUGE_PAGE, "headrace-benchmark") as segment:
        sooner = make_pages(segment.tensor)
        size = "2 MiB" if has_huge_pages(segment.tensor) else "4 KiB"
    late = "" if sooner or size == "4 KiB" else ", slower than small ones just then"
    return f"shmem_enabled {setting}, pages of {size}{late}; {torch.get_num_threads()} threads sum"


def from_disk(checkpoint: Path) -> float:
    """Return the seconds of reading the same checkpoint, from the page cache."""
    source = CheckpointSource(checkpoint)
    with Store(source, "benchmark") as store:
        begin_s = time.monotonic()
        store.publish(1)
        took_s = time.monotonic() - begin_s
    source.close()
    return took_s


def sections(num_bytes: int) -> list[Section]:
    """Measure everything."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        checkpoint = make_checkpoint(folder, num_bytes)
        host = HostSettings(socket_dir=folder / "s", permitted_uids=frozenset({os.getuid()}), mooncake=True)
        (folder / "s").mkdir(mode=0o700)
        source = CheckpointSource(checkpoint)
        keeper = stack.enter_context(keep(SourceSpec(source=source), host))
        member = stack.enter_context(Membership(keeper.exchange.invitation, "benchmark"))
        offer = member.ask(lease=True)
        total = int(source.metadata().num_bytes.sum())
        rows: list[tuple[str, ...]] = []
        setting = pages_setting()
        defaults, kept, tops, colds, took = [], [], [], [], {kind: [] for kind in ("mooncake", "tcp", "memory", "disk")}  # type: ignore[var-annotated]
        for _ in range(REPEATS):
            with own_connections():
                defaults.append(ceiling(offer, host, fresh=False))
            kept.append(ceiling(offer, host, fresh=False))
            tops.append(max(defaults[-1], kept[-1]))
            colds.append(ceiling(offer, host, fresh=True))
            for kind in ("mooncake", "tcp", "memory"):
                took[kind].append(read(offer, kind, host))
            took["disk"].append(from_disk(checkpoint))
        source.close()
    for name, speeds in (("as it comes", defaults), ("one connection, kept", kept)):
        speed = Spread.of(speeds)
        text = f"{speed.median:.2f} ({speed.least:.2f}-{speed.greatest:.2f})"
        share = f"{Spread.of([s / t for s, t in zip(speeds, tops, strict=True)]).median:.0%}"
        rows.append((f"Mooncake alone, 64 MiB reads, {name}", text, share, "", ""))
    cold = Spread.of(colds)
    share = f"{Spread.of([c / t for c, t in zip(colds, tops, strict=True)]).median:.0%}"
    name = "the same into memory that is new"
    rows.append((name, f"{cold.median:.2f} ({cold.least:.2f}-{cold.greatest:.2f})", share, "", ""))
    for kind in ("mooncake", "tcp", "memory"):
        shares = [total / one["read"] / 1e9 / best for one, best in zip(took[kind], tops, strict=True)]
        whole = [total / one["whole"] / 1e9 / best for one, best in zip(took[kind], tops, strict=True)]
        seconds = Spread.of([one["whole"] for one in took[kind]])
        rows.append((
            f"joining over {kind}",
            gb_per_s(total, Spread.of([one["read"] for one in took[kind]]).median),
            f"{Spread.of(shares).median:.0%}",
            f"{Spread.of(whole).median:.0%}",
            f"{seconds.median:.2f} ({seconds.least:.2f}-{seconds.greatest:.2f})",
        ))  # fmt: skip
    disk = Spread.of(took["disk"])
    rows.append(
        (
            "from the page cache",
            gb_per_s(total, disk.median),
            "",
            "",
            f"{disk.median:.2f} ({disk.least:.2f}-{disk.greatest:.2f})",
        )
    )
    title = f"A version of {total / 1e9:.2f} GB into this host's memory, from a keeper on loopback"
    columns = ("way", "GB/s while reading", "of Mooncake alone", "whole, of Mooncake alone", "whole, s")
    notes = (
        "whole: holders reached, memory made, bytes read and every parameter's sum checked; each pair in one round",
        "100 %: the faster of the first two, in that round",
        setting,
    )
    return [Section("p2p", title, columns, tuple(rows), notes)]


if __name__ == "__main__":
    size = float(sys.argv[1]) if len(sys.argv) > 1 else 1.2
    for section in sections(int(size * 1e9)):
        section.show(Console())
