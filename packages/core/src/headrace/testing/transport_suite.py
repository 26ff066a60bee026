"""The conformance suite of transports: subclass `TransportTests`, say how to make yours, run pytest."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.config import HostSettings
from headrace.errors import (
    ConnectError,
    LocalProtocolError,
    PeerLostError,
    PlanError,
    TransferTimeoutError,
    TransportClosedError,
    TransportError,
)
from headrace.manifest import HolderAddress, SegmentDescriptor
from headrace.plan import CopyTable
from headrace.protocols import Transport
from headrace.segments import HostSegment
from headrace.testing.copies import SEED, CopyRow, content, expected, random_strides, span_of, table_of
from headrace.testing.transport_holder import SEGMENT_BYTES, HolderProcess, serve_memory_and_tcp
from headrace.types import DTYPES, dtype_code

_WAIT_S = 30.0


@pytest.mark.timeout(120)
class TransportTests:
    """What every transport must do. Set `survives_holder`, override `make_transport`, and `serve` if needed.

    Attributes:
        survives_holder: Whether opened segments stay readable after the holder's death.
    """

    survives_holder = False

    def make_transport(self) -> Transport:
        """Return a fresh transport; override it."""
        message = f"{type(self).__name__} must override make_transport"
        raise LocalProtocolError(message)

    @staticmethod
    def serve(segments: Sequence[HostSegment], host: HostSettings) -> AbstractContextManager[HolderAddress]:
        """Make segments readable by your transport; a static method, it is run in the holder's process."""
        return serve_memory_and_tcp(segments, host)

    @pytest.fixture(scope="class")
    @classmethod
    def host(cls, tmp_path_factory: pytest.TempPathFactory) -> HostSettings:
        """Settings with a socket folder of the test's own."""
        folder = Path(tmp_path_factory.mktemp("s", numbered=True))
        folder.chmod(0o700)
        return HostSettings(socket_dir=folder, permitted_uids=frozenset({os.getuid()}))

    @pytest.fixture(scope="class")
    @classmethod
    def holder(cls, host: HostSettings) -> Iterator[HolderProcess]:
        """A holder for all tests of the class that leave it alive."""
        with HolderProcess(cls.serve, host) as made:
            yield made

    @pytest.fixture
    def mortal(self, host: HostSettings) -> Iterator[HolderProcess]:
        """A holder for one test, which may kill it."""
        with HolderProcess(self.serve, host) as made:
            yield made

    @pytest.fixture
    def transport(self) -> Iterator[Transport]:
        """The transport under test, closed afterwards."""
        made = self.make_transport()
        yield made
        made.close()

    @pytest.fixture
    def opened(self, transport: Transport, holder: HolderProcess) -> Transport:
        """The transport with all segments of `holder` open."""
        for segment in holder.segments:
            transport.open(holder.address, segment, _WAIT_S)
        return transport

    def check(self, transport: Transport, holder: HolderProcess, copies: CopyTable, *sizes: int) -> None:
        """Run copies into blocks of `sizes` bytes and compare every byte, gaps included."""
        sources = [content(i, size) for i, size in enumerate(SEGMENT_BYTES)]
        blocks = [torch.full((size,), 0xA5, dtype=torch.uint8) for size in sizes]
        wanted = expected(copies, sources, blocks)
        transport.wait(transport.submit(copies, holder.segments, blocks), _WAIT_S)
        for block, want in zip(blocks, wanted, strict=True):
            assert block.numpy().tobytes() == want.numpy().tobytes()

    def test_it_has_a_name(self, transport: Transport) -> None:
        """The name under which it is registered."""
        assert isinstance(transport, Transport)
        assert transport.name

    def test_dense_rows(self, opened: Transport, holder: HolderProcess) -> None:
        """Whole and partial segments, into several blocks."""
        copies = table_of([
            CopyRow(shape=(1 << 19,), src_strides=(2,), dst_strides=(2,), dst_base=64),
            CopyRow(shape=(3, 500), src_strides=(1000, 2), dst_strides=(1000, 2), src_block=1, dst_block=1,
                    src_base=6),
        ])  # fmt: skip
        self.check(opened, holder, copies, (1 << 20) + 100, 4000)

    def test_strided_rows(self, opened: Transport, holder: HolderProcess) -> None:
        """Gaps in the source, in the destination, in both; transposed."""
        copies = table_of([
            CopyRow(shape=(64, 128), src_strides=(4096, 2), dst_strides=(256, 2)),
            CopyRow(shape=(64, 128), src_strides=(256, 2), dst_strides=(512, 2), dst_base=20_000),
            CopyRow(shape=(30, 50), src_strides=(2, 100), dst_strides=(120, 2), src_block=1, dst_base=60_000),
            CopyRow(shape=(2, 3, 4, 5), src_strides=(4000, 800, 100, 10), dst_strides=(240, 2, 60, 12),
                    dst_base=70_000),
        ])  # fmt: skip
        self.check(opened, holder, copies, 80_000)

    def test_many_small_rows(self, opened: Transport, holder: HolderProcess) -> None:
        """Thousands of rows in any order, dense and strided mixed."""
        order = np.random.default_rng(SEED).permutation(3000).tolist()
        copies = table_of([
            CopyRow(
                shape=(4, 8), src_strides=(16 + 16 * (i % 2), 2), dst_strides=(16, 2),
                src_base=i * 128, dst_base=at * 64,
            )
            for at, i in enumerate(order)
        ])  # fmt: skip
        self.check(opened, holder, copies, 3000 * 64)

    @pytest.mark.parametrize(
        ("src", "dst"),
        [
            ("bfloat16", "float32"),
            ("float32", "bfloat16"),
            ("float16", "float64"),
            ("float8_e4m3fn", "bfloat16"),
        ],
    )
    def test_casts(self, opened: Transport, holder: HolderProcess, src: str, dst: str) -> None:
        """As `copy_` casts, dense and strided, at even and uneven bytes."""
        item, wide = DTYPES[dtype_code(src)].itemsize, DTYPES[dtype_code(dst)].itemsize
        copies = table_of([
            CopyRow(
                shape=(20, 30), src_strides=(80 * item, item), dst_strides=(40 * wide, wide),
                src_base=base, dst_base=at, src_dtype=src, dst_dtype=dst,
            )
            for base, at in ((0, 0), (8 * 1701, 8000), (8 * 1701 + 1, 16_000), (8, 24_003))
        ])  # fmt: skip
        self.check(opened, holder, copies, 32_000)

    @pytest.mark.parametrize("name", [dtype.name for dtype in DTYPES])
    def test_every_dtype_moves_its_bits(self, opened: Transport, holder: HolderProcess, name: str) -> None:
        """Also at bytes that are no multiple of the element's."""
        item = DTYPES[dtype_code(name)].itemsize
        copies = table_of([
            CopyRow(
                shape=(11, 13), src_strides=(16 * item + odd, item), dst_strides=(13 * item, item),
                src_base=8 + odd, dst_base=at, src_dtype=name, dst_dtype=name,
            )
            for odd, at in ((0, 0), (1, 2000), (0, 4003))
        ])  # fmt: skip
        self.check(opened, holder, copies, 6000)

    @pytest.mark.parametrize("seed", range(6))
    def test_random_tables(self, opened: Transport, holder: HolderProcess, seed: int) -> None:
        """Any mixture of shapes, strides, blocks and dtypes."""
        rng = np.random.default_rng((SEED, seed))
        names = ["bfloat16", "float32", "int8", "float64", "float16"]
        rows, at = [], [0, 0]
        for _ in range(40):
            shape = tuple(rng.integers(1, 7, rng.integers(1, 5)).tolist())
            name, block = names[rng.integers(len(names))], int(rng.integers(2))
            item = DTYPES[dtype_code(name)].itemsize
            order = rng.permutation(len(shape))
            src, dst = random_strides(shape, order, item, rng), random_strides(shape, order, item, rng)
            rows.append(CopyRow(
                shape=shape, src_strides=src, dst_strides=dst,
                src_block=int(rng.integers(2)), dst_block=block,
                src_base=int(rng.integers(1000)), dst_base=at[block], src_dtype=name, dst_dtype=name,
            ))  # fmt: skip
            at[block] += span_of(shape, dst, item) + int(rng.integers(9))
        self.check(opened, holder, table_of(rows), *(max(size, 1) for size in at))

    def test_nothing_to_copy(self, opened: Transport, holder: HolderProcess) -> None:
        """No rows, rows without elements, no blocks."""
        self.check(opened, holder, CopyTable.empty())
        hollow = table_of([CopyRow(shape=(0, 5), src_strides=(10, 2), dst_strides=(10, 2))])
        self.check(opened, holder, hollow, 10)

    def test_open_is_idempotent(self, opened: Transport, holder: HolderProcess) -> None:
        """Opening again neither fails nor forgets."""
        for segment in holder.segments:
            opened.open(holder.address, segment, _WAIT_S)
        self.check(opened, holder, table_of([CopyRow(shape=(9,), src_strides=(2,), dst_strides=(2,))]), 18)

    def test_a_segment_that_is_not_held(self, transport: Transport, holder: HolderProcess) -> None:
        """Unknown to the holder: `ConnectError`."""
        with pytest.raises(ConnectError):
            transport.open(holder.address, SegmentDescriptor("f" * 32, 10), _WAIT_S)

    def test_a_segment_that_is_not_open(self, transport: Transport, holder: HolderProcess) -> None:
        """Submitting copies from it: `LocalProtocolError`."""
        row = CopyRow(shape=(9,), src_strides=(2,), dst_strides=(2,))
        with pytest.raises(LocalProtocolError):
            transport.submit(table_of([row]), holder.segments, [torch.zeros(18, dtype=torch.uint8)])

    @pytest.mark.parametrize(
        "change",
        [
            {"src_base": (1 << 20) - 16},
            {"dst_base": 2},
            {"src_base": -2},
            {"dst_block": 1},
            {"src_block": 7},
            {"src_strides": (1 << 61,)},
        ],
    )
    def test_copies_that_reach_outside(
        self, opened: Transport, holder: HolderProcess, change: dict[str, object]
    ) -> None:
        """Refused whole with `PlanError`; nothing is written."""
        good = {"shape": (9,), "src_strides": (2,), "dst_strides": (2,)}
        block = torch.zeros(18, dtype=torch.uint8)
        copies = table_of([CopyRow(**good), CopyRow(**(good | change))])  # type: ignore[arg-type]
        with pytest.raises(PlanError):
            opened.submit(copies, holder.segments, [block])
        assert not block.any()

    def test_a_holder_that_is_gone(self, transport: Transport, mortal: HolderProcess) -> None:
        """Opening: `ConnectError`, soon."""
        mortal.kill()
        with pytest.raises(ConnectError):
            transport.open(mortal.address, mortal.segments[0], 5.0)

    def test_a_holder_that_dies_after_open(self, transport: Transport, mortal: HolderProcess) -> None:
        """`PeerLostError` from `wait`, or right bytes where mappings outlive their owner."""
        for segment in mortal.segments:
            transport.open(mortal.address, segment, _WAIT_S)
        mortal.kill()
        copies = table_of([CopyRow(shape=(1 << 19,), src_strides=(2,), dst_strides=(2,))])
        if self.survives_holder:
            self.check(transport, mortal, copies, 1 << 20)
            return
        job = transport.submit(copies, mortal.segments, [torch.zeros(1 << 20, dtype=torch.uint8)])
        with pytest.raises(PeerLostError):
            transport.wait(job, _WAIT_S)

    def test_a_holder_that_hangs(self, transport: Transport, mortal: HolderProcess) -> None:
        """Every call ends at its deadline, and the transport goes on afterwards."""
        transport.open(mortal.address, mortal.segments[0], _WAIT_S)
        transport.retain([mortal.segments[0].segment_id])
        copies = table_of([CopyRow(shape=(1 << 19,), src_strides=(2,), dst_strides=(2,))])
        with mortal.stopped():
            begin_s = time.monotonic()
            with pytest.raises(TransportError):
                transport.open(mortal.address, mortal.segments[1], 0.3)
            if not self.survives_holder:
                job = transport.submit(copies, mortal.segments[:1], [torch.zeros(1 << 20, dtype=torch.uint8)])
                with pytest.raises(TransferTimeoutError):
                    transport.wait(job, 0.3)
            assert time.monotonic() - begin_s < 8.0
        transport.open(mortal.address, mortal.segments[1], _WAIT_S)
        self.check(transport, mortal, copies, 1 << 20)

    def test_jobs_at_the_same_time(self, opened: Transport, holder: HolderProcess) -> None:
        """Submitted before any is waited for; waited for in another order."""
        copies = table_of([CopyRow(shape=(1 << 19,), src_strides=(2,), dst_strides=(2,))])
        blocks = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(6)]
        jobs = [opened.submit(copies, holder.segments, [block]) for block in blocks]
        assert len(set(jobs)) == 6
        for job in reversed(jobs):
            opened.wait(job, _WAIT_S)
        assert all(torch.equal(block, content(0, 1 << 20)) for block in blocks)

    def test_jobs_from_several_threads(self, opened: Transport, holder: HolderProcess) -> None:
        """Each thread gets its own bytes."""
        copies = table_of([CopyRow(shape=(256, 64), src_strides=(512, 2), dst_strides=(128, 2))])
        failed: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(5):
                    self.check(opened, holder, copies, 1 << 15)
            except (TransportError, AssertionError) as error:
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_WAIT_S)
        assert not failed

    def test_a_job_is_waited_for_once(self, opened: Transport, holder: HolderProcess) -> None:
        """Again, or one that never was: `LocalProtocolError`."""
        copies = table_of([CopyRow(shape=(9,), src_strides=(2,), dst_strides=(2,))])
        job = opened.submit(copies, holder.segments, [torch.zeros(18, dtype=torch.uint8)])
        opened.wait(job, _WAIT_S)
        for number in (job, 10**9):
            with pytest.raises(LocalProtocolError):
                opened.wait(number, _WAIT_S)

    def test_what_is_not_retained_is_opened_again(self, opened: Transport, holder: HolderProcess) -> None:
        """Until then `LocalProtocolError`; what is retained is read on."""
        copies = table_of([CopyRow(shape=(9,), src_strides=(2,), dst_strides=(2,))])
        blocks = [torch.zeros(18, dtype=torch.uint8)]
        kept, dropped = holder.segments
        opened.retain({kept.segment_id})
        opened.wait(opened.submit(copies, [kept], blocks), _WAIT_S)
        with pytest.raises(LocalProtocolError):
            opened.submit(copies, [dropped], blocks)
        opened.open(holder.address, dropped, _WAIT_S)
        opened.wait(opened.submit(copies, [dropped], blocks), _WAIT_S)

    def test_a_closed_transport(self, opened: Transport, holder: HolderProcess) -> None:
        """Every call says so; closing again is nothing."""
        copies = table_of([CopyRow(shape=(9,), src_strides=(2,), dst_strides=(2,))])
        block = torch.zeros(18, dtype=torch.uint8)
        job = opened.submit(copies, holder.segments, [block])
        opened.close()
        opened.close()
        calls: list[Callable[[], object]] = [
            lambda: opened.open(holder.address, holder.segments[0], _WAIT_S),
            lambda: opened.submit(copies, holder.segments, [block]),
            lambda: opened.wait(job, _WAIT_S),
        ]
        for call in calls:
            with pytest.raises(TransportClosedError):
                call()
