"""One kernel for many strided copies: it walks tiles of a table of blocks that lies on the device.

A block is `(n0, n1, width)` units at a source and a destination address. Tile `t` of the launch is `BLOCK` consecutive
units, counted row-major, of block `tile_block[t]`. Reads of page-locked host memory go over PCIe without a copy engine.

Tiles `[0, num_near)` read the own GPU, the others another one or the host. Programs take both kinds in turns all the
way through: multiprocessors start programs in order, so that one kind after the other would leave the link idle and
then wait for it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202, PLR0124, PLR0913, PLR0917 - kernels are no Python functions; their arguments have no types

from __future__ import annotations

import triton
import triton.language as tl

NUM_COLUMNS = 12
"""Columns of a block: source, destination, n0, n1, width, four strides (source n0, n1, destination n0, n1, in units),
first tile, row of the copy table, unused."""


@triton.jit
def _tile(num_near):
    """Return this program's tile: of any number of programs in a row, a like share is far."""
    program, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    num_far = count - num_near
    far_before = program * num_far // count
    is_far = (program + 1) * num_far // count > far_before
    return tl.where(is_far, num_near + far_before, program - far_before)


@triton.jit
def _positions(blocks, tile_block, num_near, BLOCK: tl.constexpr, DIMS: tl.constexpr):  # noqa: N803
    """Return this program's block, source and destination offsets in units, and which units exist."""
    tile = _tile(num_near)
    block = blocks + tl.load(tile_block + tile).to(tl.int64) * 12
    n1, width = tl.load(block + 3), tl.load(block + 4)
    start = (tile - tl.load(block + 9)) * BLOCK
    row = start // width
    x = (start - row * width).to(tl.int32) + tl.arange(0, BLOCK)
    narrow = width.to(tl.int32)
    step = x // narrow
    column = (x - step * narrow).to(tl.int64)
    exists = start + tl.arange(0, BLOCK) < tl.load(block + 2) * n1 * width
    if DIMS == 2:
        inner = row + step
        source = inner * tl.load(block + 6) + column
        destination = inner * tl.load(block + 8) + column
    else:
        outer = row // n1
        y = (row - outer * n1).to(tl.int32) + step
        carry = y // n1.to(tl.int32)
        inner = (y - carry * n1.to(tl.int32)).to(tl.int64)
        outer = outer + carry
        source = outer * tl.load(block + 5) + inner * tl.load(block + 6) + column
        destination = outer * tl.load(block + 7) + inner * tl.load(block + 8) + column
    return block, source, destination, exists


@triton.jit(do_not_specialize=["num_near"])
def copy_blocks(
    blocks, tile_block, num_near, SOURCE: tl.constexpr, DESTINATION: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr  # noqa: N803
):  # fmt: skip
    """Copy; where the unit types differ, cast to nearest even."""
    block, source, destination, exists = _positions(blocks, tile_block, num_near, BLOCK, DIMS)
    found = tl.load(tl.load(block).to(tl.pointer_type(SOURCE)) + source, mask=exists)
    tl.store(tl.load(block + 1).to(tl.pointer_type(DESTINATION)) + destination, found.to(DESTINATION), mask=exists)


@triton.jit(do_not_specialize=["num_near"])
def compare_blocks(
    blocks, tile_block, num_near, different, SOURCE: tl.constexpr, DESTINATION: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr, BLOCK: tl.constexpr, DIMS: tl.constexpr, CAST: tl.constexpr  # noqa: N803
):  # fmt: skip
    """Set `different[row]` where a destination does not have the bits that `copy_blocks` writes.

    After a cast any NaN is as good as another.
    """
    block, source, destination, exists = _positions(blocks, tile_block, num_near, BLOCK, DIMS)
    wanted = tl.load(tl.load(block).to(tl.pointer_type(SOURCE)) + source, mask=exists, other=0).to(DESTINATION)
    found = tl.load(tl.load(block + 1).to(tl.pointer_type(DESTINATION)) + destination, mask=exists, other=0)
    wrong = wanted.to(BITS, bitcast=True) != found.to(BITS, bitcast=True)
    if CAST:
        wrong = wrong & ~((wanted != wanted) & (found != found))
    count = tl.sum((wrong & exists).to(tl.int32), axis=0)
    tl.store(different + tl.load(block + 10), 1, mask=count > 0)
