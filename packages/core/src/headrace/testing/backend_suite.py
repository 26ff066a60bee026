"""The conformance suite of engines: subclass `BackendTests`, say how to make a worker, run pytest."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from headrace.config import HostSettings
from headrace.errors import LocalProtocolError
from headrace.protocols import InferenceBackend, Skeleton
from headrace.recipe import LoadRecipe
from headrace.recording import prove, record, whole_tensors
from headrace.server.parameter_server import ParameterServer
from headrace.store.checkpoint import CheckpointSource
from headrace.testing.faults import spoil
from headrace.testing.local_engine import LocalEngine
from headrace.testing.recipe_backend import write_recipe
from headrace.types import ParamTable, VerifyMode

SEED, OTHER_SEED = 101, 202


@dataclass(frozen=True)
class Weights:
    """One checkpoint and what a fresh engine makes of it.

    Attributes:
        folder: Where the checkpoint is.
        metas: Its parameters.
        tensors: Its tensors, whole.
        live: Bytes of every live tensor of an engine that was started from it.
        output: What that engine computes.
    """

    folder: Path
    metas: ParamTable
    tensors: dict[str, torch.Tensor]
    live: dict[str, bytes]
    output: torch.Tensor


def contents(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Return every tensor's elements as bytes, row-major, whatever its strides and device."""
    with torch.inference_mode():
        return {
            name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for name, tensor in tensors.items()
        }


@pytest.mark.timeout(600)
class BackendTests:
    """What every InferenceBackend must do, on one worker of world size 1 or more. Override the class methods.

    The suite starts two engines per class: one that it works on, and one fresh from other weights to compare with.

    Attributes:
        refuses_whole: Whether a `load` that is refused leaves every live tensor as it was.
    """

    refuses_whole = False

    @classmethod
    def make_checkpoint(cls, folder: Path, seed: int) -> Path:
        """Write a checkpoint whose weights depend on `seed`, all else equal; override it."""
        message = f"{cls.__name__} must override make_checkpoint"
        raise LocalProtocolError(message, name=str((folder, seed)))

    @classmethod
    def make_backend(cls, checkpoint: Path) -> InferenceBackend:
        """Return a worker whose engine was just started from `checkpoint`; override it."""
        message = f"{cls.__name__} must override make_backend"
        raise LocalProtocolError(message, name=str(checkpoint))

    @classmethod
    def compute(cls, backend: InferenceBackend) -> torch.Tensor:
        """Return what the engine computes from a fixed input, such as logits; override it."""
        message = f"{cls.__name__} must override compute"
        raise LocalProtocolError(message, name=type(backend).__name__)

    @classmethod
    def close_backend(cls, backend: InferenceBackend) -> None:
        """End the engine that `make_backend` started; nothing by default."""

    @classmethod
    def reported_version(cls, backend: InferenceBackend) -> int | None:  # noqa: ARG003
        """Return the version that the engine reports; None where it cannot be asked here."""
        return None

    @pytest.fixture(scope="class")
    @classmethod
    def other(cls, tmp_path_factory: pytest.TempPathFactory) -> Weights:
        """Other weights, and what a fresh engine makes of them."""
        with cls._started(cls.make_checkpoint(tmp_path_factory.mktemp("other"), OTHER_SEED)) as (backend, folder):
            return cls._weights(backend, folder)

    @pytest.fixture(scope="class")
    @classmethod
    def shared(
        cls, tmp_path_factory: pytest.TempPathFactory, other: Weights  # noqa: ARG003 - that engine ends first
    ) -> Iterator[tuple[InferenceBackend, Weights]]:
        """The engine that all tests of the class work on, with its first weights."""
        with cls._started(cls.make_checkpoint(tmp_path_factory.mktemp("first"), SEED)) as (backend, folder):
            yield backend, cls._weights(backend, folder)

    @pytest.fixture
    def first(self, shared: tuple[InferenceBackend, Weights]) -> Weights:
        """The weights that the engine was started with."""
        return shared[1]

    @pytest.fixture
    def backend(self, shared: tuple[InferenceBackend, Weights]) -> InferenceBackend:
        """The worker under test, holding the first weights."""
        backend, first = shared
        if contents(backend.live_tensors()) != first.live:
            reload(backend, first.tensors)
        return backend

    @classmethod
    @contextmanager
    def _started(cls, folder: Path) -> Iterator[tuple[InferenceBackend, Path]]:
        backend = cls.make_backend(folder)
        try:
            yield backend, folder
        finally:
            cls.close_backend(backend)

    @classmethod
    def _weights(cls, backend: InferenceBackend, folder: Path) -> Weights:
        source = CheckpointSource(folder)
        read, metas = whole_tensors(source), source.metadata()
        tensors = {meta.name: read(meta.name) for meta in metas}
        source.close()
        return Weights(folder, metas, tensors, contents(backend.live_tensors()), cls.compute(backend).clone())

    def test_identity_is_constant(self, backend: InferenceBackend) -> None:
        """Who a worker is does not change, and its rank lies in its world."""
        assert isinstance(backend, InferenceBackend)
        identity = backend.identity()
        assert identity == backend.identity()
        assert 0 <= identity.worker.rank < identity.world_size
        assert identity.worker.instance
        assert identity.device_uuid
        assert identity.layout
        assert torch.device(identity.device).type in ("cpu", "cuda")
        assert backend.free_memory_bytes() > 0

    def test_live_tensors_are_no_copies(self, backend: InferenceBackend) -> None:
        """Asked twice, the same memory; every tensor has a unit, and may be left out or not."""
        once, again = backend.live_tensors(), backend.live_tensors()
        assert {n: t.data_ptr() for n, t in once.items()} == {n: t.data_ptr() for n, t in again.items()}
        assert not any(tensor.is_meta for tensor in once.values())
        assert {type(backend.reload_unit(name)) for name in once} == {str}
        assert {type(backend.optional(name)) for name in once} == {bool}

    def test_it_says_what_it_was_loaded_from(self, backend: InferenceBackend, first: Weights) -> None:
        """The folder of the first weights, or nothing any more."""
        folder = backend.loaded_from()
        assert folder is None or Path(folder).resolve() == first.folder.resolve()

    def test_the_model_reads_what_is_written_in_place(self, backend: InferenceBackend, other: Weights) -> None:
        """Bytes that another engine has in its live tensors make this one compute what that one does."""
        if backend.derived() and not backend.rederive(()):
            pytest.skip("what is derived from weights cannot be made again here")
        with torch.inference_mode(), backend.commit_scope():
            for name, tensor in backend.live_tensors().items():
                kind = torch.frombuffer(bytearray(other.live[name]), dtype=torch.uint8) if other.live[name] else None
                if kind is not None:
                    tensor.copy_(kind.view(tensor.dtype).view(tensor.shape))
            backend.rederive(tuple(backend.derived()))
        assert torch.equal(self.compute(backend), other.output)

    def test_load_writes_what_a_fresh_engine_has(self, backend: InferenceBackend, other: Weights) -> None:
        """Inside its life cycle, from a source in any order, and again over itself."""
        for seed in (1, 2):
            reload(backend, _shuffled(other.tensors, seed))
            assert _differing(backend, other.live) == []
            assert torch.equal(self.compute(backend), other.output)

    def test_an_empty_reload_changes_nothing(self, backend: InferenceBackend, first: Weights) -> None:
        """All weights again: names, shapes, dtypes and bytes stay."""
        before = _layout(backend.live_tensors())
        reload(backend, first.tensors)
        assert _layout(backend.live_tensors()) == before
        assert _differing(backend, first.live) == []

    def test_the_skeleton_is_the_model_without_data(self, backend: InferenceBackend, first: Weights) -> None:
        """On the meta device, alike where the layout is still the loader's, and apart from the live tensors."""
        skeleton = _skeleton(backend)
        live = backend.live_tensors()
        assert skeleton.tensors
        assert all(tensor.is_meta for tensor in skeleton.tensors.values())
        assert live.keys() & skeleton.tensors.keys()
        skeleton.load((name, tensor.to("meta")) for name, tensor in first.tensors.items())
        assert _differing(backend, first.live) == []

    def test_a_recorded_recipe_does_what_load_does(
        self, backend: InferenceBackend, first: Weights, other: Weights
    ) -> None:
        """Recorded with the first weights' names, replayed with the other weights, byte for byte."""
        recipe = _recipe(backend, first)
        assert _differing(backend, first.live) == []
        with torch.inference_mode(), backend.commit_scope():
            write_recipe(recipe, backend.live_tensors(), _on(backend, other.tensors).items())
        wrong = set(_differing(backend, other.live)) - recipe.opaque_reasons.keys()
        assert wrong <= {name for name in other.live if backend.optional(name)}

    def test_most_of_the_model_is_recorded(self, backend: InferenceBackend, first: Weights) -> None:
        """What goes through the loader instead is the exception, and every one has its reason."""
        recipe = _recipe(backend, first)
        assert len(recipe.regions) > 0
        assert all(recipe.opaque_reasons.values())

    def test_the_proof_passes(self, backend: InferenceBackend, first: Weights) -> None:
        """Against the checkpoint that the engine holds, nothing becomes opaque."""
        recipe = _recipe(backend, first)
        proven = self._proof(backend, recipe, first)
        assert proven.proven
        assert proven.opaque_reasons == recipe.opaque_reasons

    def test_the_proof_finds_a_bit(self, backend: InferenceBackend, first: Weights) -> None:
        """One spoiled bit makes its tensor opaque, and the proof writes nothing."""
        recipe = _recipe(backend, first)
        chosen = next(m.name for m in recipe.targets if m.name not in recipe.opaque_reasons and m.num_elements)
        with torch.inference_mode(), backend.commit_scope():
            spoil(backend, chosen)
        spoiled = contents(backend.live_tensors())
        assert chosen in self._proof(backend, recipe, first).opaque_reasons
        assert contents(backend.live_tensors()) == spoiled
        reload(backend, first.tensors)
        assert _differing(backend, first.live) == []

    def test_derived_tensors_follow_their_inputs(
        self, backend: InferenceBackend, first: Weights, other: Weights
    ) -> None:
        """They are fed by live tensors; where they can be made again, that alone completes a change."""
        derived, live = backend.derived(), backend.live_tensors()
        assert {feed for feeds in derived.values() for feed in feeds} <= live.keys()
        if not backend.rederive(()):
            pytest.skip("the engine cannot derive again; inputs go through its loader")
        with torch.inference_mode(), backend.commit_scope():
            backend.rederive(tuple(derived))
        assert torch.equal(self.compute(backend), first.output)
        assert not torch.equal(first.output, other.output)

    def test_the_version_changes_no_weight(self, backend: InferenceBackend, first: Weights) -> None:
        """It is reported from then on, where the engine can be asked here."""
        for version in (3, 4):
            backend.set_version(version)
            assert self.reported_version(backend) in (None, version)
        assert _differing(backend, first.live) == []

    def test_the_commit_scope_can_be_entered_again(self, backend: InferenceBackend, first: Weights) -> None:
        """Also after the body raised; the exception comes through."""
        with pytest.raises(KeyError, match="mine"), backend.commit_scope():
            raise KeyError("mine")
        for _ in range(2):
            with backend.commit_scope():
                pass
        assert _differing(backend, first.live) == []
        assert torch.equal(self.compute(backend), first.output)

    def test_a_wrong_shape_is_refused(self, backend: InferenceBackend, first: Weights) -> None:
        """Whatever the engine raises; the next good load heals."""
        name, tensor = max(first.tensors.items(), key=lambda pair: pair[1].numel())
        wrong = torch.zeros([extent + 1 for extent in tensor.shape], dtype=tensor.dtype)
        with pytest.raises(Exception, match=r"."):  # engines raise what they like
            reload(backend, {name: wrong})
        if self.refuses_whole:
            assert _differing(backend, first.live) == []
        reload(backend, first.tensors)
        assert _differing(backend, first.live) == []
        assert torch.equal(self.compute(backend), first.output)

    @pytest.mark.parametrize("verify", ["digest", "full"])
    def test_updates_arrive(
        self, backend: InferenceBackend, first: Weights, other: Weights, tmp_path: Path, verify: VerifyMode
    ) -> None:
        """A real parameter server brings the other weights and the first ones back, each twice."""
        if backend.identity().world_size > 1:
            pytest.skip("one rank alone is no instance")
        host = HostSettings(socket_dir=tmp_path, permitted_uids=frozenset())
        engine = LocalEngine([backend])
        tensors = {name: tensor.clone() for name, tensor in other.tensors.items()}
        try:
            with ParameterServer(tensors=tensors, host=host) as server:
                for weights in (other, first, other, first):
                    for name, tensor in weights.tensors.items():
                        tensors[name].copy_(tensor)
                    report = server.update(engine, verify=verify)
                    assert _differing(backend, weights.live) == []
                    assert torch.equal(self.compute(backend), weights.output)
                    assert self.reported_version(backend) in (None, report.version)
        finally:
            engine.close()
        assert (engine.paused, engine.pauses) == (False, 4)

    def _proof(self, backend: InferenceBackend, recipe: LoadRecipe, weights: Weights) -> LoadRecipe:
        tensors = _on(backend, weights.tensors)
        return prove(recipe, backend.live_tensors(), tensors.__getitem__, reload_unit=backend.reload_unit)


def reload(backend: InferenceBackend, tensors: Mapping[str, torch.Tensor]) -> None:
    """Bring whole tensors in through the engine's own loader and life cycle, as a receiver does."""
    with torch.inference_mode(), backend.commit_scope():
        backend.begin_reload()
        backend.load(_on(backend, tensors).items())
        backend.end_reload()
        backend.rederive(tuple(backend.derived()))


def _on(backend: InferenceBackend, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = backend.identity().device
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _skeleton(backend: InferenceBackend) -> Skeleton:
    skeleton = backend.skeleton()
    if skeleton is None:
        pytest.skip("the engine has no skeleton; all its updates go through its loader")
    return skeleton


def _recipe(backend: InferenceBackend, weights: Weights) -> LoadRecipe:
    return record(
        _skeleton(backend),
        weights.metas,
        live=backend.live_tensors(),
        reload_unit=backend.reload_unit,
        optional=backend.optional,
        derived=backend.derived(),
        can_rederive=backend.rederive(()),
    )


def _layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (tuple(t.shape), t.dtype, t.stride()) for name, t in tensors.items()}


def _differing(backend: InferenceBackend, wanted: Mapping[str, bytes]) -> list[str]:
    found = contents(backend.live_tensors())
    assert found.keys() == wanted.keys()
    return [name for name, data in found.items() if data != wanted[name]]


def _shuffled(tensors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    pairs = list(tensors.items())
    random.Random(seed).shuffle(pairs)  # noqa: S311 - an order, no secret
    return dict(pairs)
