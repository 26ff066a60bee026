"""Pages of segments: where they lie, how they are made, and what they never change."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from headrace.mapping import HUGE_PAGE, MappedMemory
from headrace.segments import HostSegment, MappedSegment
from headrace.segments.ahead import PagesAhead
from headrace.segments.pages import PAGE, has_huge_pages, make_pages

SIZE = 5 * HUGE_PAGE + 3 * PAGE + 100


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel refuse huge pages."""
    monkeypatch.setattr("headrace.segments.pages._MADV_COLLAPSE", 9999)


def test_mappings_lie_where_huge_pages_fit() -> None:
    with HostSegment(SIZE) as owner, MappedSegment(owner.fd, owner.descriptor) as mapped:
        assert owner.tensor.data_ptr() % HUGE_PAGE == 0
        assert mapped.tensor.data_ptr() % HUGE_PAGE == 0
        assert owner.tensor.numel() == mapped.tensor.numel() == SIZE


def test_memory_without_a_descriptor_is_writable_and_empty() -> None:
    memory = MappedMemory(-1, PAGE, writable=True)
    assert memory.address % HUGE_PAGE == 0


def test_a_mapping_that_is_refused() -> None:
    with HostSegment(PAGE) as owner, pytest.raises(PermissionError):
        MappedMemory(owner.fd, PAGE, writable=True)


def test_making_pages_changes_no_byte() -> None:
    with HostSegment(SIZE) as owner:
        owner.tensor.copy_(torch.arange(SIZE) % 251)
        wanted = owner.tensor.clone()
        make_pages(owner.tensor)
        make_pages(owner.tensor[HUGE_PAGE // 2 : 3 * HUGE_PAGE + 7])
        assert torch.equal(owner.tensor, wanted)


def test_huge_pages_of_the_owner_are_those_of_its_peers() -> None:
    with HostSegment(SIZE) as owner, MappedSegment(owner.fd, owner.descriptor) as mapped:
        make_pages(owner.tensor)
        if not has_huge_pages(owner.tensor):
            pytest.skip(
                "this kernel makes no huge pages of shared memory; `headrace doctor` says how to let it"
            )
        mapped.populate()
        assert has_huge_pages(mapped.tensor)


@pytest.mark.usefixtures("refused")
def test_small_pages_are_made_where_huge_ones_are_refused() -> None:
    with HostSegment(SIZE) as owner:
        assert not make_pages(owner.tensor)
        assert not has_huge_pages(owner.tensor)
        assert resident(owner) == SIZE // PAGE * PAGE


def resident(owner: HostSegment) -> int:
    """Return the bytes of whole pages that a segment has."""

    return os.fstat(owner.fd).st_blocks * 512 // PAGE * PAGE


@pytest.mark.parametrize("kind", ["huge", "small"])
def test_pages_are_made_once_by_whoever_comes_first(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "small":
        request.getfixturevalue("refused")
    with HostSegment(24 * HUGE_PAGE) as one, HostSegment(SIZE) as other:
        with PagesAhead([one.tensor, other.tensor]) as memory:
            threads = [threading.Thread(target=memory.need, args=(0, 0, 24 * HUGE_PAGE)) for _ in range(3)]
            for thread in threads:
                thread.start()
            memory.need(1, 0, SIZE)
            for thread in threads:
                thread.join(30)
            one.tensor.fill_(3)
        assert resident(one) >= 24 * HUGE_PAGE
        assert resident(other) >= SIZE // PAGE * PAGE
        assert bool((one.tensor == 3).all())


def test_nothing_is_made_after_the_end() -> None:
    with HostSegment(24 * HUGE_PAGE) as owner:
        with PagesAhead([owner.tensor[:0]]) as memory:
            pass
        memory.need(0, 0, 24 * HUGE_PAGE)
        assert resident(owner) == 0
