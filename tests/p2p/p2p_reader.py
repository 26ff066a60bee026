"""Reads what a keeper's holders hold, into memory of its own, and says what came of it; as a joiner without an engine.

Arguments: metas file, transport, checkpoint to compare with, seconds of patience. Prints `reading` when the first bytes
have come, then one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from headrace.errors import HeadraceError
from headrace.server.fetching import ReadSettings
from headrace.server.invitation import Invitation
from headrace.server.joining import Ways
from headrace.server.membership import Membership
from headrace.server.reading import PeerSource
from headrace.store.checkpoint import CheckpointSource
from headrace.store.layout import Layout


def main() -> None:
    metas, transport, checkpoint, patience_s = sys.argv[1:5]
    settings = ReadSettings(
        batch_bytes=1 << 20, open_s=5.0, patience_s=float(patience_s), least_bytes_per_s=5e6
    )
    facts: dict[str, object] = {}
    told = False

    def tell(given: dict[str, int], total: int) -> None:
        nonlocal told
        member.tell(offer.version, given, total)
        if not told:
            told = True
            say("reading")

    ways = Ways(transport)
    with Membership(Invitation.load(Path(metas)), "reader") as member:
        try:
            offer = member.ask(lease=True)
            source = PeerSource(offer, ways, settings, tell)
            layout = Layout.of(source.metadata(), source.regions())
            blocks = [torch.zeros(size, dtype=torch.uint8) for size in layout.segment_bytes]
            source.fill(layout.region_table(), blocks, lambda _done, _total: None, 120.0)
            facts = {
                "version": offer.version,
                "seconds": dict(source.seconds),
                "given": dict(source.given),
                "transports": ways.used,
                "equal": differing(layout, blocks, Path(checkpoint)) == [],
            }
        except HeadraceError as error:
            facts = {"error": f"{type(error).__name__}: {error}"}
    say(json.dumps(facts))
    ways.close()
    os._exit(0)


def say(line: str) -> None:
    """Write a line to the test at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def differing(layout: Layout, blocks: list[torch.Tensor], checkpoint: Path) -> list[str]:
    """Return the parameters whose bytes are not those of the checkpoint's file."""
    source, wrong = CheckpointSource(checkpoint), []
    for slot in layout.slots:
        found = blocks[slot.segment][slot.begin : slot.begin + slot.num_bytes].numpy().tobytes()
        wanted = bytearray(slot.num_bytes)
        source.read(slot.region, memoryview(wanted))
        if hashlib.sha256(found).digest() != hashlib.sha256(wanted).digest():
            wrong.append(slot.region.name)
    return wrong


if __name__ == "__main__":
    main()
