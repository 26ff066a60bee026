"""Copy programs into a GPU's memory: every kind of copy, from every kind of memory, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from headrace.errors import PlanError
from headrace.plan import CopyTable
from headrace.segments.host import HostSegment, MappedSegment
from headrace.segments.pinning import PIN_CHUNK_BYTES
from headrace.testing.copies import CopyRow, expected, random_strides, span_of, table_of
from headrace.transports.binding import bind_copies
from headrace.transports.program import CopyProgram

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(300)]

ITEM = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "uint8": 1, "int64": 8, "float8_e4m3fn": 1}
FLOATS = ("bfloat16", "float16", "float32", "float64")
DEADLINE_S = 60.0


def finite(num_bytes: int) -> torch.Tensor:
    """Return fresh random bytes that are finite in every floating dtype."""
    return torch.randint(0, 0x3F, (num_bytes,), dtype=torch.uint8)


def poisoned(num_bytes: int) -> torch.Tensor:
    return torch.full((num_bytes,), 0xEE, dtype=torch.uint8, device="cuda")


def random_rows(rng: np.random.Generator, count: int, source_bytes: int) -> tuple[CopyTable, int]:
    rows, at = [], 0
    for number in range(count):
        shape = tuple(int(n) for n in rng.integers(1, 20, int(rng.integers(1, 5))))
        if number % 5 == 0:
            shape = (int(rng.integers(1, 40_000)),)
        kind = str(rng.choice(list(ITEM)))
        into = str(rng.choice(FLOATS)) if kind in FLOATS and rng.random() < 0.4 else kind
        order = rng.permutation(len(shape)) if number % 3 == 0 else np.arange(len(shape))[::-1]
        if number % 7 == 0:
            order = order[::-1]
        src = random_strides(shape, order, ITEM[kind], rng)
        dst = random_strides(shape, np.arange(len(shape))[::-1], ITEM[into], rng)
        at = -(-at // 8) * 8 + int(rng.integers(0, 4)) * int(rng.integers(0, 2))
        room = source_bytes - span_of(shape, src, ITEM[kind])
        base = int(rng.integers(0, room))
        base -= base % (8 if rng.random() < 0.7 else 1)
        rows.append(
            CopyRow(shape=shape, src_strides=src, dst_strides=dst, src_base=base, dst_base=at,
                    src_dtype=kind, dst_dtype=into)
        )  # fmt: skip
        at += span_of(shape, dst, ITEM[into])
    return table_of(rows), at


@pytest.fixture(params=["device", "pinned", "mapped", "pageable"])
def source(request: pytest.FixtureRequest) -> Iterator[torch.Tensor]:
    data = finite(1 << 20)
    if request.param != "mapped":
        yield {"device": data.cuda, "pinned": data.pin_memory, "pageable": data.clone}[request.param]()
        return
    with HostSegment(len(data)) as segment, MappedSegment(segment.fd, segment.descriptor) as mapped:
        segment.tensor.copy_(data)
        mapped.prepare(1 << 20, pin=True)
        yield mapped.tensor


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_of_random_copies(source: torch.Tensor, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table, size = random_rows(rng, 150, len(source))
    block = poisoned(size + 64)
    want = expected(table, [source.cpu()], [block.cpu()])[0]
    program = bind_copies(table, [source], [block])
    assert program.differences() == list(range(len(table)))
    program.run()
    program.finish(DEADLINE_S)
    assert torch.equal(block.cpu(), want)
    assert program.differences() == []
    for row in (3, 77, 149):
        block[int(table.dst_base[row])] ^= 1
    assert program.differences() == [3, 77, 149]


@pytest.mark.parametrize("gentle", [False, True])
def test_every_byte_where_copies_of_all_kinds_of_memory_take_turns(gentle: bool) -> None:
    """The second source counts as another GPU's; its memory is this one's, which reads alike."""
    rng = np.random.default_rng(5)
    data = [finite(1 << 22) for _ in range(4)]
    table, size = random_rows(rng, 600, 1 << 22)
    table = replace(table, src_block=rng.integers(0, 4, len(table), dtype=np.int32))
    block = poisoned(size)
    want = expected(table, data, [block.cpu()])[0]
    sources = [data[0].cuda(), data[1].cuda(), data[2].pin_memory(), data[3]]
    program = bind_copies(table, sources, [block], gentle=gentle, peers=frozenset({1}))
    program.run()
    program.finish(DEADLINE_S)
    assert torch.equal(block.cpu(), want)
    assert program.differences() == []


def test_casts_round_as_torch_does() -> None:
    wide = torch.randn(100_000) * torch.logspace(-40, 38, 100_000)
    for into in ("bfloat16", "float16"):
        block = poisoned(2 * len(wide))
        row = CopyRow(
            shape=(len(wide),), src_strides=(4,), dst_strides=(2,), src_dtype="float32", dst_dtype=into
        )
        bind_copies(table_of([row]), [wide.view(torch.uint8).pin_memory()], [block]).run()
        torch.cuda.synchronize()
        assert torch.equal(block.cpu(), wide.to(getattr(torch, into)).view(torch.uint8))


def test_long_runs_cross_the_chunks_in_which_memory_is_locked() -> None:
    size = 3 * PIN_CHUNK_BYTES + 12_345
    with HostSegment(size) as segment:
        segment.tensor.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8))
        with MappedSegment(segment.fd, segment.descriptor) as mapped:
            mapped.prepare(16 << 20, pin=True)
            block = poisoned(size)
            row = CopyRow(shape=(size - 3,), src_strides=(1,), dst_strides=(1,), src_base=3, dst_base=1,
                          src_dtype="uint8", dst_dtype="uint8")  # fmt: skip
            matrix = CopyRow(shape=(size // 4096 // 2, 1024), src_strides=(4096, 1), dst_strides=(1024, 1),
                             src_dtype="uint8", dst_dtype="uint8", dst_block=1)  # fmt: skip
            strided = poisoned(size // 8)
            program = bind_copies(table_of([row, matrix]), [mapped.tensor], [block, strided])
            program.run()
            program.finish(DEADLINE_S)
            assert torch.equal(block[1 : size - 2].cpu(), mapped.tensor[3:])
            assert program.differences() == []
            assert (block[0], block[-1]) == (0xEE, 0xEE)
            del program


def test_runs_are_ordered_against_the_current_stream() -> None:
    """What the stream was given before is overwritten, what it is given afterwards sees the new bytes."""
    count = 1 << 24
    data = torch.randint(0, 256, (count,), dtype=torch.uint8)
    block = poisoned(count)
    row = CopyRow(shape=(count,), src_strides=(1,), dst_strides=(1,), src_dtype="uint8", dst_dtype="uint8")
    program = bind_copies(table_of([row]), [data.pin_memory()], [block])
    busy = torch.randn(4096, 4096, device="cuda")
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                busy = busy @ busy * 1e-3
            block.fill_(1)
            program.run()
            after = block.clone()
            block.fill_(2)
            program.finish(DEADLINE_S)
        assert torch.equal(after.cpu(), data)
        assert (block == 2).all()


def test_tables_stay_small() -> None:
    rows = [
        CopyRow(shape=(2048, 384), src_strides=(1536, 2), dst_strides=(768, 2), dst_base=0)
        for _ in range(18_900)
    ]
    source = torch.zeros(2048 * 1536, dtype=torch.uint8).pin_memory()
    program = bind_copies(table_of(rows), [source], [poisoned(2048 * 768)])
    assert program.table_bytes <= 64 << 20  # type: ignore[attr-defined]


def test_what_reaches_outside_is_refused() -> None:
    row = CopyRow(shape=(100,), src_strides=(2,), dst_strides=(2,))
    with pytest.raises(PlanError, match="destination of copy 0"):
        bind_copies(table_of([row]), [torch.zeros(200, dtype=torch.uint8)], [poisoned(199)])
    with pytest.raises(PlanError, match="holds torch.float32"):
        bind_copies(table_of([row]), [torch.zeros(200, dtype=torch.uint8)], [torch.zeros(100, device="cuda")])


def test_destinations_on_the_host_stay_with_the_host() -> None:
    row = CopyRow(shape=(100,), src_strides=(2,), dst_strides=(2,))
    assert isinstance(
        bind_copies(table_of([row]), [finite(200)], [torch.zeros(200, dtype=torch.uint8)]), CopyProgram
    )
