"""Box algebra against numpy: index arrays are the truth."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.geometry import Box, Loop, RegionTable, boxes_of_flat_range, contiguous_strides, place_copy

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)
RUNS = settings(max_examples=300, deadline=None, derandomize=True)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    low = [draw(st.integers(0, n)) for n in shape]
    return Box(tuple(low), tuple(draw(st.integers(0, n - lo)) for n, lo in zip(shape, low, strict=True)))


def mask(shape: tuple[int, ...], box: Box) -> np.ndarray:
    out = np.zeros(shape, np.int64)
    out[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))] = 1
    return out


@RUNS
@given(st.data(), SHAPES)
def test_intersect_and_subtract(data: st.DataObject, shape: tuple[int, ...]) -> None:
    one, two = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = one.intersect(two)
    both = mask(shape, one) * mask(shape, two)
    assert np.array_equal(mask(shape, common) if common else np.zeros(shape), both)
    left = sum((mask(shape, part) for part in one.subtract(two)), np.zeros(shape, np.int64))
    assert np.array_equal(left, mask(shape, one) - both)
    assert len(one.subtract(two)) <= max(2 * len(shape), 1)


@RUNS
@given(st.data(), SHAPES)
def test_flat_ranges_become_boxes_in_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    begin = data.draw(st.integers(0, prod(shape)))
    end = data.draw(st.integers(begin, prod(shape)))
    index = np.arange(prod(shape)).reshape(shape)
    found = boxes_of_flat_range(shape, begin, end)
    parts = [
        index[tuple(slice(o, o + n) for o, n in zip(b.offsets, b.shape, strict=True))].ravel() for b in found
    ]
    assert np.concatenate([np.zeros(0, np.int64), *parts]).tolist() == list(range(begin, end))
    assert len(found) <= max(2 * len(shape) - 1, 1)


@RUNS
@given(SHAPES, st.integers(1, 8))
def test_contiguous_strides_are_numpys(shape: tuple[int, ...], itemsize: int) -> None:
    expected = np.empty(shape, np.dtype(f"V{itemsize}")).strides
    assert contiguous_strides(shape, itemsize) == expected


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], np.ndarray]:
    """A tensor's shape and the element numbers of a random pure view of it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    view = np.arange(prod(shape)).reshape(shape)
    for _ in range(draw(st.integers(0, 4))):
        view = draw(_next_view(view))
    return shape, view


@st.composite
def _next_view(draw: st.DrawFn, view: np.ndarray) -> np.ndarray:
    if view.ndim == 0:
        return view
    dim = draw(st.integers(0, view.ndim - 1))
    kind = draw(st.sampled_from(["narrow", "step", "transpose", "split", "select"]))
    if kind == "narrow":
        begin = draw(st.integers(0, view.shape[dim] - 1))
        return np.moveaxis(
            np.moveaxis(view, dim, 0)[begin : draw(st.integers(begin + 1, view.shape[dim]))], 0, dim
        )
    if kind == "step":
        return np.moveaxis(np.moveaxis(view, dim, 0)[:: draw(st.integers(1, 3))], 0, dim)
    if kind == "transpose":
        return np.swapaxes(view, dim, draw(st.integers(0, view.ndim - 1)))
    if kind == "select":
        return np.take(view, draw(st.integers(0, view.shape[dim] - 1)), axis=dim)
    halves = [n for n in (2, 3) if view.shape[dim] % n == 0]
    if not halves:
        return view
    n = draw(st.sampled_from(halves))
    return view.reshape(*view.shape[:dim], n, view.shape[dim] // n, *view.shape[dim + 1 :])


@RUNS
@given(views(), st.integers(0, 5), st.booleans())
def test_place_copy_places_every_element_of_a_view(
    made: tuple[tuple[int, ...], np.ndarray], target: int, column_major: bool
) -> None:
    shape, view = made
    steps = contiguous_strides(view.shape)
    if column_major:
        steps = tuple(reversed(contiguous_strides(tuple(reversed(view.shape)))))
    sources = _source_strides(view)
    loops = [Loop(n, s, t) for n, s, t in zip(view.shape, sources, steps, strict=True)]
    placed = place_copy(shape, loops, int(view.flat[0]), target, limit=1 << 20)
    assume(placed is not None)
    assert placed is not None
    assert _landing(shape, placed) == _expected_landing(view, steps, target)


def _source_strides(view: np.ndarray) -> list[int]:
    """Return element strides of a view of `arange`, read from its values."""
    first = (0,) * view.ndim
    return [
        int(view[tuple(int(d == dim) for d in range(view.ndim))] - view[first]) if view.shape[dim] > 1 else 1
        for dim in range(view.ndim)
    ]


def _landing(shape: tuple[int, ...], placed: list) -> dict[int, int]:
    index = np.arange(prod(shape)).reshape(shape)
    out: dict[int, int] = {}
    for part in placed:
        numbers = index[tuple(slice(o, o + n) for o, n in zip(part.box.offsets, part.box.shape, strict=True))]
        for at in np.ndindex(*part.box.shape):
            place = part.base + sum(i * s for i, s in zip(at, part.strides, strict=True))
            assert place not in out
            out[place] = int(numbers[at])
    return out


def _expected_landing(view: np.ndarray, steps: tuple[int, ...], target: int) -> dict[int, int]:
    return {
        target + sum(i * s for i, s in zip(at, steps, strict=True)): int(view[at])
        for at in np.ndindex(*view.shape)
    }


def test_place_copy_gives_up_at_the_limit() -> None:
    loops = [Loop(4, 2, 1)]
    assert place_copy((8,), loops, 0, 0, limit=3) is None
    assert len(place_copy((8,), loops, 0, 0, limit=4) or []) == 4
    assert place_copy((8,), [Loop(0, 1, 1)], 0, 0, limit=1) == []


def test_region_tables_widen_and_join() -> None:
    one = RegionTable.from_rows([(3, Box((1,), (2,)), 5, 7, (4,))])
    two = RegionTable.from_rows([(4, Box((0, 2), (3, 1)), 6, 8, (16, 4))])
    table = RegionTable.concat([one, two])
    assert table.offsets.tolist() == [[1, 0], [0, 2]]
    assert table.shape.tolist() == [[2, 1], [3, 1]]
    assert table.strides.tolist() == [[4, 0], [16, 4]]
    assert list(table.boxes([1, 2])) == [Box((1,), (2,)), Box((0, 2), (3, 1))]
    assert table.take(np.array([1])).base.tolist() == [8]
    assert len(RegionTable.concat([])) == 0
    assert RegionTable.from_rows([(0, Box((), ()), 0, 0, ())]).num_elements.tolist() == [1]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_whole_box_is_everything(shape: tuple[int, ...]) -> None:
    assert Box.whole(shape).num_elements == prod(shape)
    assert Box.whole(shape).subtract(Box.whole(shape)) == []
