"""Copy programs on every kind of destination, and what they notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.errors import PlanError
from headrace.plan import CopyTable
from headrace.testing.copies import CopyRow, content, expected, table_of
from headrace.transports import CopyProgram
from headrace.types import DTYPES

pytestmark = pytest.mark.timeout(60)

SIZE = 1 << 16


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def dense(count: int, **changes: object) -> CopyTable:
    return table_of([CopyRow(shape=(count,), src_strides=(2,), dst_strides=(2,), **changes)])  # type: ignore[arg-type]


@pytest.fixture
def source() -> torch.Tensor:
    return content(0, SIZE)


@pytest.mark.parametrize("kind", ["parameter", "buffer", "inference", "slice", "transposed", "subclass"])
def test_live_tensors_are_written_in_place(source: torch.Tensor, kind: str) -> None:
    class Own(torch.nn.Parameter):
        pass

    whole = torch.zeros(50, 40, dtype=torch.bfloat16)
    with torch.inference_mode(kind == "inference"):
        live = {
            "parameter": lambda: torch.nn.Parameter(whole),
            "buffer": lambda: whole,
            "inference": lambda: torch.zeros(50, 40, dtype=torch.bfloat16),
            "slice": lambda: whole[10:, 5:],
            "transposed": lambda: torch.nn.Parameter(whole.t()),
            "subclass": lambda: Own(whole),  # type: ignore[no-untyped-call]
        }[kind]()
    strides = tuple(stride * 2 for stride in live.stride())
    shape, pointer = tuple(live.shape), live.data_ptr()
    copies = table_of([CopyRow(shape=shape, src_strides=(2 * shape[1], 2), dst_strides=strides, src_base=6)])
    program = CopyProgram(copies, [source], [live])
    assert program.differences() == [0]
    program.run()
    assert program.differences() == []
    assert bits(live) == source[6 : 6 + 2 * live.numel()].numpy().tobytes()
    assert live.data_ptr() == pointer
    assert live.requires_grad == isinstance(live, torch.nn.Parameter)
    if kind == "slice":
        assert not whole[:10].any()
        assert not whole[:, :5].any()


def test_a_program_runs_as_often_as_the_source_changes(source: torch.Tensor) -> None:
    own, block = source.clone(), torch.zeros(2000, dtype=torch.uint8)
    program = CopyProgram(dense(1000), [own], [block])
    for step in range(3):
        own[:2000] = step + 1
        program.run()
        assert (block == step + 1).all()


@pytest.mark.parametrize("name", [dtype.name for dtype in DTYPES])
def test_every_pattern_of_bits_survives(name: str) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    wide = patterns.repeat_interleave(4).contiguous()
    block = torch.zeros_like(wide)
    item = next(dtype.itemsize for dtype in DTYPES if dtype.name == name)
    row = CopyRow(
        shape=(len(wide) // item,), src_strides=(item,), dst_strides=(item,), src_dtype=name, dst_dtype=name
    )
    program = CopyProgram(table_of([row]), [wide], [block])
    program.run()
    assert torch.equal(block, wide)
    assert program.differences() == []


def test_differences_name_the_rows(source: torch.Tensor) -> None:
    rows = [
        CopyRow(
            shape=(10, 10),
            src_strides=(40, 2),
            dst_strides=(20, 2),
            src_base=i * 400 + i % 2,
            dst_base=i * 200,
        )
        for i in range(20)
    ]
    block = torch.zeros(4000, dtype=torch.uint8)
    program = CopyProgram(table_of(rows), [source], [block])
    program.run()
    assert program.differences() == []
    for row in (3, 4, 19):
        block[row * 200 + 57] ^= 1
    assert program.differences() == [3, 4, 19]


def test_differences_after_casts(source: torch.Tensor) -> None:
    rows = [
        CopyRow(
            shape=(100,), src_strides=(2,), dst_strides=(4,), src_base=base, dst_base=at, dst_dtype="float32"
        )
        for base, at in ((0, 0), (1001, 400), (2000, 801))
    ]
    block = torch.zeros(1300, dtype=torch.uint8)
    program = CopyProgram(table_of(rows), [source], [block])
    assert program.differences() == [0, 1, 2]
    program.run()
    assert program.differences() == []
    assert torch.equal(block, expected(table_of(rows), [source], [torch.zeros_like(block)])[0])
    block[802] ^= 1
    assert program.differences() == [2]


def test_the_payload_of_a_nan_counts_where_it_is_copied_not_where_it_is_cast() -> None:
    values = torch.full((64,), float("nan"), dtype=torch.float32)
    values.view(torch.int32)[::3] |= 0x155
    source = values.view(torch.uint8)
    same, narrow = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    strides = {"src_strides": (4,), "src_dtype": "float32"}
    exact = CopyProgram(
        table_of([CopyRow(shape=(64,), dst_strides=(4,), dst_dtype="float32", **strides)]),  # type: ignore[arg-type]
        [source],
        [same],
    )
    cast = CopyProgram(
        table_of([CopyRow(shape=(64,), dst_strides=(2,), **strides)]),  # type: ignore[arg-type]
        [source],
        [narrow],
    )
    exact.run()
    cast.run()
    assert exact.differences() == cast.differences() == []
    same.view(torch.int32)[5] ^= 1
    narrow.view(torch.int16)[5] ^= 1
    assert exact.differences() == [0]
    assert cast.differences() == []
    narrow[5] = 1.0
    assert cast.differences() == [0]


def test_blocks_inside_larger_storage_keep_to_themselves(source: torch.Tensor) -> None:
    whole = torch.zeros(1000, dtype=torch.uint8)
    program = CopyProgram(dense(50, src_base=3, dst_base=1), [source[101:]], [whole[201:401]])
    program.run()
    assert torch.equal(whole[202:302], source[104:204])
    assert not whole[:202].any()
    assert not whole[302:].any()


def test_what_reaches_outside_is_refused(source: torch.Tensor) -> None:
    whole = torch.zeros(1000, dtype=torch.uint8)
    for copies in (dense(51), dense(50, dst_base=1), dense(50, src_base=SIZE - 99), dense(5, dst_block=1)):
        with pytest.raises(PlanError, match="outside its memory"):
            CopyProgram(copies, [source], [whole[:100]])
    with pytest.raises(PlanError, match="destination of copy 0"):
        CopyProgram(dense(101), [source], [torch.zeros(100, dtype=torch.bfloat16)])


def test_a_live_tensor_of_another_dtype_is_refused(source: torch.Tensor) -> None:
    with pytest.raises(PlanError, match=r"destination 0 holds torch\.float32"):
        CopyProgram(dense(5), [source], [torch.zeros(100)])


def test_rows_without_elements_are_nothing(source: torch.Tensor) -> None:
    block = torch.zeros(100, dtype=torch.uint8)
    rows = [
        CopyRow(shape=(0, 4), src_strides=(8, 2), dst_strides=(8, 2)),
        CopyRow(shape=(5,), src_strides=(2,), dst_strides=(2,)),
    ]
    program = CopyProgram(table_of(rows), [source], [block])
    assert program.differences() == [1]
    program.run()
    assert program.differences() == []
    assert np.array_equal(block[:10].numpy(), source[:10].numpy())
    CopyProgram(CopyTable.empty(), [], []).run()
