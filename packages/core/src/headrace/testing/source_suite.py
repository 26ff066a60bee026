"""The conformance suites of weight sources: subclass `SourceTests`, or `SteppedSourceTests` for a trainer's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.errors import HeadraceError, LocalProtocolError, StepMissedError, TransferTimeoutError
from headrace.geometry import Box
from headrace.protocols import SourceRegion, SteppedSource, WeightSource
from headrace.types import ParamTable


@pytest.mark.timeout(120)
class SourceTests:
    """What every WeightSource must do. Override `make_sources`; whole tensors say what is right."""

    def make_sources(self, folder: Path) -> tuple[Sequence[WeightSource], Mapping[str, torch.Tensor]]:
        """Return the sources of all ranks, and the whole tensors that they hold together; override it.

        Args:
            folder: Empty, the test's own.
        """
        message = f"{type(self).__name__} must override make_sources"
        raise LocalProtocolError(message, name=str(folder))

    @pytest.fixture
    def made(self, tmp_path: Path) -> Iterator[tuple[Sequence[WeightSource], Mapping[str, torch.Tensor]]]:
        """Sources and tensors, closed afterwards."""
        sources, tensors = self.make_sources(tmp_path)
        yield sources, tensors
        for source in sources:
            source.close()

    @pytest.fixture
    def sources(self, made: tuple[Sequence[WeightSource], Mapping[str, torch.Tensor]]) -> Sequence[WeightSource]:
        """One source per rank."""
        return made[0]

    @pytest.fixture
    def tensors(
        self, made: tuple[Sequence[WeightSource], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        """What they hold together."""
        return made[1]

    def test_metadata_is_equal_everywhere(
        self, sources: Sequence[WeightSource], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """On every rank and at every call: names, dtypes and shapes of whole tensors."""
        tables = [source.metadata() for source in sources for _ in range(2)]
        assert all(isinstance(source, WeightSource) for source in sources)
        assert len({table.key for table in tables}) == 1
        assert {m.name: (m.dtype, m.shape) for m in tables[0]} == {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()
        }

    def test_regions_are_stable_and_inside(self, sources: Sequence[WeightSource]) -> None:
        """Each is a box of a known parameter, of its rank, the same at every call."""
        for source in sources:
            metas, regions = source.metadata(), list(source.regions())
            assert regions == list(source.regions())
            for region in regions:
                shape = _shape(metas, region)
                assert len(region.box.shape) == len(shape)
                assert all(o >= 0 for o in region.box.offsets)
                assert region.box.intersect(Box.whole(shape)) == region.box or not region.box.num_elements

    def test_regions_of_a_rank_are_disjoint(self, sources: Sequence[WeightSource]) -> None:
        """No element is held twice by one rank."""
        for source in sources:
            counts = _counts([source])
            assert all(count.max(initial=0) <= 1 for count in counts.values())

    def test_all_ranks_hold_everything(self, sources: Sequence[WeightSource]) -> None:
        """Every element of every parameter is somewhere; replicas may be."""
        assert all(count.min(initial=1) >= 1 for count in _counts(sources).values())

    def test_reads_are_exact(
        self, sources: Sequence[WeightSource], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Every region, row-major, in the metadata's dtype; read twice."""
        for source in sources:
            for region in source.regions():
                assert _read(source, region) == _read(source, region) == _expected(tensors, region)

    def test_reads_from_several_threads(
        self, sources: Sequence[WeightSource], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """All regions at once, several times."""
        jobs = [(source, region) for source in sources for region in source.regions()] * 4
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda job: _read(*job), jobs))
        assert found == [_expected(tensors, region) for _, region in jobs]

    def test_a_buffer_of_another_size_is_refused(self, sources: Sequence[WeightSource]) -> None:
        """Too short and too long, and nothing is written."""
        source, region = _some_region(sources)
        size = len(_read(source, region))
        for wrong in (size - 1, size + 1):
            buffer = bytearray(b"\xa5" * wrong)
            with pytest.raises(HeadraceError):
                source.read(region, memoryview(buffer))
            assert buffer == b"\xa5" * wrong

    def test_a_foreign_name_is_refused(self, sources: Sequence[WeightSource]) -> None:
        """The error names it."""
        stranger = SourceRegion("no.such.parameter", Box((0,), (1,)))
        with pytest.raises(HeadraceError, match=r"no\.such\.parameter"):
            sources[0].read(stranger, memoryview(bytearray(4)))

    def test_nothing_is_read_after_close(self, sources: Sequence[WeightSource]) -> None:
        """Closing again is nothing."""
        source, region = _some_region(sources)
        size = len(_read(source, region))
        source.close()
        source.close()
        with pytest.raises(HeadraceError):
            source.read(region, memoryview(bytearray(size)))


class SteppedSourceTests(SourceTests):
    """What every SteppedSource must do besides. Override `make_sources` and `advance`."""

    def advance(self, source: WeightSource, change: Callable[[], None]) -> None:  # noqa: ARG002
        """Take one step of the source's trainer, in which `change` is called while weights may change; override it."""
        message = f"{type(self).__name__} must override advance"
        raise LocalProtocolError(message)

    @pytest.fixture
    def stepped(self, sources: Sequence[WeightSource]) -> SteppedSource:
        """The first rank's source."""
        assert isinstance(sources[0], SteppedSource)
        return sources[0]

    def test_aliases_are_earlier_regions_of_equal_boxes(self, sources: Sequence[WeightSource]) -> None:
        """And no alias is of an alias."""
        for source in sources:
            assert isinstance(source, SteppedSource)
            regions, aliases = source.regions(), source.aliases()
            for index, first in aliases.items():
                assert first < index
                assert first not in aliases
                assert regions[first].box == regions[index].box

    def test_what_is_offered_can_be_had_at_once(self, stepped: SteppedSource) -> None:
        """Again after every step."""
        for _ in range(3):
            with stepped.at(stepped.offer(0), 0.0):
                pass
            self.advance(stepped, lambda: None)

    def test_later_offers_are_later(self, stepped: SteppedSource) -> None:
        """So that ranks which are apart meet."""
        offers = [stepped.offer(attempt) for attempt in range(6)]
        assert offers == sorted(offers)
        assert offers[-1] > offers[0] + 5

    def test_a_past_step_is_missed(self, stepped: SteppedSource) -> None:
        """At once, whatever the deadline."""
        step = stepped.offer(0)
        self.advance(stepped, lambda: None)
        with pytest.raises(StepMissedError), stepped.at(step, 60.0):
            pass

    def test_a_step_that_does_not_come_has_a_deadline(self, stepped: SteppedSource) -> None:
        """It is no miss: the step may still come."""
        with pytest.raises(TransferTimeoutError), stepped.at(stepped.offer(0) + 1, 0.01):
            pass

    def test_a_reader_and_a_step_exclude_each_other(self, stepped: SteppedSource) -> None:
        """The trainer's next step begins when the reader has closed its context."""
        step, open_readers = stepped.offer(0), [0]
        found: list[int] = []
        with ThreadPoolExecutor(1) as pool:
            with stepped.at(step, 0.0):
                open_readers[0] = 1
                future = pool.submit(self.advance, stepped, lambda: found.append(open_readers[0]))
                with pytest.raises(TimeoutError):
                    future.result(0.1)
                open_readers[0] = 0
            future.result(30)
        assert found == [0]


def _shape(metas: ParamTable, region: SourceRegion) -> tuple[int, ...]:
    index = metas.index_of(region.name)
    assert index is not None, f"{region.name} is no parameter"
    shape: tuple[int, ...] = metas[index].shape
    return shape


def _counts(sources: Sequence[WeightSource]) -> dict[str, np.ndarray]:
    counts = {meta.name: np.zeros(meta.shape, np.int32) for meta in sources[0].metadata()}
    for source in sources:
        for region in source.regions():
            counts[region.name][_index(region)] += 1
    return counts


def _index(region: SourceRegion) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(region.box.offsets, region.box.shape, strict=True))


def _read(source: WeightSource, region: SourceRegion) -> bytes:
    metas = source.metadata()
    index = metas.index_of(region.name)
    assert index is not None
    itemsize = metas[index].num_bytes // max(metas[index].num_elements, 1)
    buffer = bytearray(region.box.num_elements * itemsize)
    source.read(region, memoryview(buffer))
    return bytes(buffer)


def _expected(tensors: Mapping[str, torch.Tensor], region: SourceRegion) -> bytes:
    part = tensors[region.name].detach()[_index(region)].cpu().contiguous()
    return part.reshape(-1).view(torch.uint8).numpy().tobytes()


def _some_region(sources: Sequence[WeightSource]) -> tuple[WeightSource, SourceRegion]:
    return next((s, r) for s in sources for r in s.regions() if r.box.num_elements)
