"""Reads through Mooncake: the suite, what a helper refuses, and what is never used again."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.config import HostSettings
from headrace.errors import BackendUnavailableError, PeerLostError, RemoteProtocolError, TransferTimeoutError
from headrace.manifest import HolderAddress
from headrace.segments import HostSegment
from headrace.testing.copies import CopyRow, content, expected, random_strides, table_of
from headrace.testing.leaks import children
from headrace.testing.transport_holder import HolderProcess
from headrace.testing.transport_suite import TransportTests
from headrace.transports import CopyProgram
from headrace.transports.mooncake_engine import (
    CODES,
    DIRECTORY_BYTES,
    check,
    decode_directory,
    encode_directory,
    missing,
)
from headrace.transports.mooncake_gate import Gate, GateEngine, Shown
from headrace.transports.mooncake_process import HelperProcess
from headrace.transports.mooncake_reads import staged_reads
from headrace.types import DTYPES, dtype_code

pytestmark = pytest.mark.timeout(120)
WHOLE = table_of([CopyRow(shape=(1 << 19,), src_strides=(2,), dst_strides=(2,))])


needs_mooncake = pytest.mark.skipif(bool(missing()), reason=missing() or "Mooncake is there")


@pytest.mark.parametrize(("lacks", "way_out"), [("module", "headrace[p2p]"), ("library", "libibverbs1")])
def test_what_is_missing_is_named_with_the_way_to_get_it(
    lacks: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("importlib.util.find_spec", lambda _: None if lacks == "module" else object())
    monkeypatch.setattr("ctypes.CDLL", refuse)
    assert way_out in missing()


def shown(segments: Sequence[HostSegment]) -> list[Shown]:
    return [Shown(s.descriptor.segment_id, s.descriptor.num_bytes, s.fd) for s in segments]


@contextmanager
def serve_in_this_process(segments: Sequence[HostSegment], host: HostSettings) -> Iterator[HolderAddress]:
    """Run the helper's engine in the holder's own process, so that who stops the holder stops it."""
    engine = GateEngine(host.advertise_host)
    engine.show(os.getpid(), shown(segments))
    yield HolderAddress(f"holder-{os.getpid()}", mooncake=engine.facts["session"])


@contextmanager
def serve_by_helper(segments: Sequence[HostSegment], host: HostSettings) -> Iterator[HolderAddress]:
    """Run the helper as a holder does."""
    gate = Gate(host)
    gate.show(shown(segments))
    yield HolderAddress(f"holder-{os.getpid()}", mooncake=gate.endpoint)
    gate.close()


@needs_mooncake
class TestMooncakeTransport(TransportTests):
    def make_transport(self) -> Any:
        from headrace.transports.mooncake import MooncakeTransport

        return MooncakeTransport(slot_bytes=4 << 20)

    @staticmethod
    def serve(segments: Sequence[HostSegment], host: HostSettings) -> AbstractContextManager[HolderAddress]:
        return serve_in_this_process(segments, host)

    def test_reads_that_are_given_up_use_up_staging_until_a_new_helper_takes_over(
        self, transport: Any, mortal: HolderProcess
    ) -> None:
        open_all(transport, mortal)
        first = transport._staging.helper.pid
        blocks = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(4)]
        with mortal.stopped():
            for block in blocks:
                job = transport.submit(WHOLE, mortal.segments[:1], [block])
                with pytest.raises(TransferTimeoutError):
                    transport.wait(job, 0.2)
        self.check(transport, mortal, WHOLE, 1 << 20)
        assert transport._staging.helper.pid != first
        assert not any(block.any() for block in blocks), "bytes of a read that was given up have landed"

    def test_a_holder_is_asked_once_for_all_its_segments(
        self, transport: Any, holder: HolderProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        call = HelperProcess.call

        def watched(helper: HelperProcess, request: Any, deadline_s: float) -> Any:
            asked.append(request)
            return call(helper, request, deadline_s)

        looks = [{"session": holder.address.mooncake}]
        transport._fresh_staging()
        monkeypatch.setattr(HelperProcess, "call", watched)
        open_all(transport, holder)
        assert asked == looks
        transport.retain([holder.segments[0].segment_id])
        open_all(transport, holder)
        assert asked == 2 * looks, "what a holder showed before the last retain is old"

    def test_waiting_for_a_holder_that_hangs_takes_no_core(self, transport: Any, mortal: HolderProcess) -> None:
        open_all(transport, mortal)
        helper = transport._staging.helper.pid
        with mortal.stopped():
            before_s = cpu_seconds(helper)
            job = transport.submit(WHOLE, mortal.segments[:1], [torch.zeros(1 << 20, dtype=torch.uint8)])
            with pytest.raises(TransferTimeoutError):
                transport.wait(job, 3.0)
            assert cpu_seconds(helper) - before_s < 1.0, "the helper spins while it waits"

    def test_a_holder_takes_its_helper_along(self, host: HostSettings, transport: Any) -> None:
        with HolderProcess(serve_by_helper, host) as holder:
            open_all(transport, holder)
            self.check(transport, holder, WHOLE, 1 << 20)
            (helper,) = children(holder.pid)
            holder.kill()
            limit = time.monotonic() + 20
            while Path(f"/proc/{helper}").exists() and time.monotonic() < limit:
                time.sleep(0.05)
            assert not Path(f"/proc/{helper}").exists()
            job = transport.submit(WHOLE, holder.segments[:1], [torch.zeros(1 << 20, dtype=torch.uint8)])
            with pytest.raises(PeerLostError):
                transport.wait(job, 30)

    def test_a_stranger_cannot_write_what_is_held(self, host: HostSettings, transport: Any) -> None:
        with HolderProcess(serve_by_helper, host) as holder:
            open_all(transport, holder)
            session, address = transport._places[holder.segments[0].segment_id]
            assert stranger_writes(session, address) != 0
            self.check(transport, holder, WHOLE, 1 << 20)


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_all(transport: Any, holder: HolderProcess) -> None:
    for segment in holder.segments:
        transport.open(holder.address, segment, 30)


def stranger_writes(session: str, address: int) -> int:
    """Write to a peer's memory as anybody could, in a process of its own; return Mooncake's code."""
    program = f"""
        import os
        from mooncake.engine import TransferEngine
        import numpy as np
        engine = TransferEngine()
        engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
        data = np.full(4096, 0xEE, np.uint8)
        engine.register_memory(data.ctypes.data, 4096)
        code = engine.batch_transfer_sync_write({session!r}, [data.ctypes.data], [{address}], [4096])
        os.write(1, f"code {{code}}".encode())
        os._exit(0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=60, check=True
    )
    return int(done.stdout.rpartition(b"code ")[2])


def test_every_code_is_mapped() -> None:
    check(0, "a call")
    for code, kind in CODES.items():
        with pytest.raises(kind):
            check(code, "a call")
    with pytest.raises(RemoteProtocolError, match="-77"):
        check(-77, "a call")


def test_directories_come_back() -> None:
    segments = {f"{i:032x}": (1 << 40 | i << 12, 4096 * i) for i in range(1000)}
    data = encode_directory(3, segments).ljust(DIRECTORY_BYTES, b"\0")
    assert decode_directory(data) == segments
    assert decode_directory(data[:100] + b"\xff" + data[101:]) is None, "half-written ones are told"
    with pytest.raises(RemoteProtocolError):
        decode_directory(b"HTTP" + data[4:])
    with pytest.raises(BackendUnavailableError, match="larger segments"):
        encode_directory(1, {f"{i:032x}": (0, 0) for i in range(DIRECTORY_BYTES // 48 + 1)})


@pytest.mark.parametrize("seed", range(8))
def test_batches_read_what_copies_need(seed: int) -> None:
    """Any mixture of rows, dense, strided and overlapping, through slots of any size, against plain copies."""
    rng = np.random.default_rng(seed)
    slot_bytes = int(rng.choice([1 << 12, 1 << 14, 1 << 17]))
    rows, at = [], 0
    for _ in range(24):
        shape = (*rng.integers(1, 9, rng.integers(1, 4)).tolist(), int(rng.choice([1, 7, 600])))
        name = ["bfloat16", "float32", "int8"][rng.integers(3)]
        item = DTYPES[dtype_code(name)].itemsize
        order = rng.permutation(len(shape))
        src = random_strides(shape, order, item, rng)
        dense = tuple(int(np.prod(shape[d + 1 :])) * item for d in range(len(shape)))
        rows.append(CopyRow(shape=shape, src_strides=src, dst_strides=dense, src_block=int(rng.integers(2)),
                            src_base=int(rng.integers(1 << 16)), dst_base=at,
                            src_dtype=name, dst_dtype=name))  # fmt: skip
        at += int(np.prod(shape)) * item
    copies = table_of(rows)
    sources = [content(0, 1 << 22), content(1, 1 << 22)]
    wanted = expected(copies, sources, [torch.zeros(at, dtype=torch.uint8)])[0]
    found = torch.zeros(at, dtype=torch.uint8)
    for batch in staged_reads(copies, slot_bytes):
        slot = torch.zeros(slot_bytes, dtype=torch.uint8)
        for segment, begin, to, size in batch.ranges.tolist():
            assert to + size <= slot_bytes
            slot[to : to + size] = sources[segment][begin : begin + size]
        CopyProgram(batch.copies, [slot], [found]).run()
    assert torch.equal(found, wanted)


def test_neighbours_are_one_range() -> None:
    """Regions as a store lays them out, at multiples of 64 with gaps, are read in long ranges."""
    row = partial(CopyRow, shape=(50,), src_strides=(2,), dst_strides=(2,))
    rows = [row(src_base=128 * i, dst_base=100 * i) for i in range(3000)]
    (batch,) = staged_reads(table_of(rows), 1 << 20)
    assert len(batch.ranges) == 1
