"""Checkpoints and tensors that cannot be put in place: refused before the pause, with everything that is wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults_world import PARAMS, MakeWorld, World, make_tensors, write_checkpoint
from safetensors.torch import save_file

from headrace.config import Deadlines
from headrace.errors import (
    CapacityError,
    CheckpointError,
    HeadraceError,
    ManifestMismatchError,
    UncoveredRegionError,
    UpdateFailedError,
)
from headrace.holder import holder
from headrace.protocols import SourceRegion
from headrace.segments import capacity
from headrace.server.parameter_server import ParameterServer
from headrace.store import TensorSource

NORM, QUERY, EMBED = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"


def causes(error: HeadraceError) -> set[str]:
    """Return the classes of what failed, on the ranks or here."""
    if isinstance(error, UpdateFailedError):
        return {failure.type_name for failure in error.failures.values()}
    return {type(error).__name__}


def unnoticed(world: World) -> None:
    """Check that the engine has not even been paused."""
    world.check()
    assert world.engine.pauses == 0


def indexed(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a checkpoint with an index."""
    write_checkpoint(folder, tensors)
    names = list(tensors)
    files = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def spoil_header(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[20:40] = b"\xff" * 20
    file.write_bytes(bytes(data))


def empty(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(b"")


def take_file_away(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def name_twice(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    save_file({NORM: torch.zeros(SIZE, dtype=torch.bfloat16)}, folder / "zz.safetensors")


SIZE = 48


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (truncate, "model-0000"),
        (spoil_header, "model-0000"),
        (empty, "model-0000"),
        (take_file_away, "model-00002-of-00002"),
        (name_twice, NORM),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    world: World, tmp_path: Path, damage: Callable[[Path], None], text: str
) -> None:
    folder = indexed(tmp_path / "bad", make_tensors(2))
    damage(folder)
    with pytest.raises(CheckpointError, match=text):
        ParameterServer(folder)
    unnoticed(world)


@pytest.mark.parametrize("damage", [truncate, spoil_header, take_file_away])
def test_a_checkpoint_damaged_later_fails_the_update(
    world: World, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """The parameter server has seen it whole; holders read it when they start."""
    folder = indexed(tmp_path / "bad", make_tensors(2))
    server = world.server(checkpoint=folder)
    damage(folder)
    error = world.fails(server)
    assert "model-0000" in str(error)
    unnoticed(world)


def test_every_update_brings_what_the_checkpoint_is_then(world: World, tmp_path: Path) -> None:
    """A link goes to another checkpoint, then the files that it leads to are written again."""
    latest = tmp_path / "latest"
    latest.symlink_to(write_checkpoint(tmp_path / "one", make_tensors(2)))
    server = world.server(checkpoint=latest)
    world.update(server, 2)
    latest.unlink()
    latest.symlink_to(write_checkpoint(tmp_path / "two", make_tensors(3)))
    world.update(server, 3)
    write_checkpoint(tmp_path / "two", make_tensors(4))
    world.update(server, 4)


def test_missing_and_duplicate_names(world: World) -> None:
    tensors = make_tensors(2)
    del tensors[NORM], tensors[QUERY]
    error = world.fails(world.server(tensors=tensors))
    assert causes(error) == {"UncoveredRegionError"} or isinstance(error, UncoveredRegionError)
    assert "qkv_proj" in str(error)
    assert NORM in str(error)
    unnoticed(world)
    with pytest.raises(HeadraceError, match=NORM):
        ParameterServer(tensors=[(NORM, tensors[EMBED]), (NORM, tensors[EMBED])])


def test_all_differences_are_listed_before_the_pause(world: World) -> None:
    """A wrong shape, an integer, a quantised tensor: all in one error."""
    tensors = make_tensors(2)
    tensors[EMBED] = torch.zeros(251, SIZE, dtype=torch.bfloat16)
    tensors[NORM] = torch.zeros(SIZE, dtype=torch.int64)
    tensors[QUERY] = tensors[QUERY].to(torch.float32).to(torch.float8_e4m3fn)
    error = world.fails(world.server(tensors=tensors))
    assert causes(error) <= {"ManifestMismatchError"}
    for name in (EMBED, NORM, QUERY):
        assert name in str(error)
    unnoticed(world)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_a_dtype_of_another_kind_is_refused(world: World, kind: torch.dtype) -> None:
    tensors = make_tensors(2)
    for name in (NORM, QUERY):
        tensors[name] = torch.zeros(tensors[name].shape, dtype=kind)
    error = world.fails(world.server(tensors=tensors))
    assert causes(error) == {"ManifestMismatchError"}
    assert NORM in str(error)
    assert QUERY in str(error)
    unnoticed(world)


def test_another_floating_dtype_is_cast(world: World) -> None:
    wide = {name: tensor.to(torch.float32) for name, tensor in make_tensors(2).items()}
    server = world.server(tensors=wide)
    world.update(server, 2)
    report = world.update(server, 2)
    assert report.workers[0].casts[0].startswith("float32->bfloat16")


def test_a_wrong_shape_is_refused(world: World) -> None:
    tensors = make_tensors(2)
    tensors[QUERY] = torch.zeros(SIZE, SIZE + 1, dtype=torch.bfloat16)
    error = world.fails(world.server(tensors=tensors))
    assert causes(error) == {"ManifestMismatchError"}
    assert QUERY in str(error)
    assert str((SIZE, SIZE + 1)) in str(error)
    unnoticed(world)


def test_unused_names_are_reported_and_refused_if_strict(world: World) -> None:
    tensors = make_tensors(2) | {"mtp.layers.0.weight": torch.zeros(7)}
    server = world.server(tensors=tensors)
    error = world.fails(server, strict=True)
    assert isinstance(error, ManifestMismatchError)
    assert error.differences == ("mtp.layers.0.weight",)
    unnoticed(world)
    assert world.update(server, 2).unused_names == ("mtp.layers.0.weight",)


def test_no_memory_for_the_segments(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder of this process is told that the machine is nearly full."""
    with monkeypatch.context() as patch:
        patch.setattr(capacity, "available_memory_bytes", lambda *_: 1000)
        error = world.fails(world.trainer(2))
    assert causes(error) == {"CapacityError"}
    assert "raise the memory limit" in str(error)
    unnoticed(world)


def test_a_budget_below_one_slot_is_refused(world: World) -> None:
    error = world.fails(world.trainer(2), route="direct", transport="tcp", budget_bytes=100)
    assert isinstance(error, CapacityError)
    assert "100" in str(error)
    unnoticed(world)


def test_a_tiny_budget_is_slow_and_succeeds(world: World) -> None:
    report = world.update(
        world.trainer(2), 2, route="broadcast", budget_bytes=4096 + 512, bucket_bytes=4096
    )
    assert {worker.ring.split(":")[0] for worker in report.workers} == {"serial"}


def test_a_source_that_fails_while_it_is_read(world: World) -> None:
    """Its owner frees a tensor; the next publish with all of them succeeds."""
    tensors = make_tensors(2)
    server = world.server(tensors=tensors)
    kept = tensors[QUERY].clone()
    tensors[QUERY].untyped_storage().resize_(0)
    error = world.fails(server)
    assert QUERY in str(error)
    unnoticed(world)
    tensors[QUERY].untyped_storage().resize_(kept.nbytes)
    tensors[QUERY].copy_(kept)
    world.update(server, 2)


class HangingSource(TensorSource):
    """Reads come to no end until `release` is set."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.release = threading.Event()

    def read(self, region: SourceRegion, out: memoryview) -> None:
        self.release.wait(60)
        super().read(region, out)


def test_a_source_that_hangs_does_not_keep_its_server_from_closing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "CLOSE_S", 0.5)
    source = HangingSource(make_tensors(2))
    server = world.server(source=source)
    begin = time.monotonic()
    error = world.fails(server, deadlines=Deadlines(read_s=1.0))
    assert "read" in str(error)
    server.close()
    assert time.monotonic() - begin < 25
    source.release.set()
    unnoticed(world)


def test_the_world_has_all_parameters() -> None:
    assert {NORM, QUERY, EMBED} <= {meta.name for meta in PARAMS}


def test_a_loader_that_needs_whole_tensors_needs_memory(make_world: MakeWorld) -> None:
    """After a dummy start the first update over a network is staged whole: a budget below is refused before the pause.

    On the same host the loader reads the holder's memory, and no budget is too small.
    """
    world = make_world(loaded_seed=None)
    error = world.fails(world.trainer(2), route="direct", transport="tcp", budget_bytes=1000)
    assert isinstance(error, CapacityError)
    assert world.engine.pauses == 0
    world.update(world.trainer(2), 2, budget_bytes=0)
    world.heals()


def test_a_progress_callback_that_raises_does_not_stop_the_update(world: World) -> None:
    """While holders read it is called in a thread that everybody waits for."""

    def progress(_phase: str, done: int, _total: int) -> None:
        if done:
            raise BrokenPipeError("whoever showed this is gone")

    world.update(world.server(2), 2, progress=progress)
