"""Proof: what the engine really loaded decides; and recipes survive the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from recording_layers import Decoder, Tp, decoder_sources

from headrace.errors import IntegrityError
from headrace.protocols import SourceRegion
from headrace.recipe import LoadRecipe
from headrace.recording import RecipeCache, prove, whole_tensors
from headrace.types import ParamTable

Make = Callable[..., Any]


def load(module: Any, pairs: Any) -> object:
    return module.load_weights(pairs)


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


@pytest.fixture
def loaded(make_bench: Make) -> Any:
    made = make_bench(Decoder(Tp(2, 1), experts=4), load, decoder_sources(experts=4))
    made.recipe = made.record()
    made.load_really()
    return made


def proof(made: Any) -> LoadRecipe:
    return prove(made.recipe, made.live, made.tensors.__getitem__, reload_unit=module_of)


def test_a_right_recipe_is_proven_whole(loaded: Any) -> None:
    proven = proof(loaded)
    assert proven.proven
    assert not loaded.recipe.proven
    assert len(proven.regions) == len(loaded.recipe.regions)
    assert len(proven.fills) == len(loaded.recipe.fills) > 0
    assert not proven.opaque_reasons


def test_repacked_rows_of_equal_shape_are_found(loaded: Any) -> None:
    name = "layers.1.experts.w13_weight"
    loaded.live[name].data.copy_(loaded.live[name].data.flip(1))
    proven = proof(loaded)
    assert "differ from what was recorded" in proven.opaque_reasons[name]
    unit = ("w13_weight", "w2_weight", "w13_scale")
    assert set(proven.opaque_reasons) == {f"layers.1.experts.{leaf}" for leaf in unit}
    opaque = {proven.sources[i].name for i in proven.opaque}
    assert opaque == {n for n in loaded.tensors if n.startswith("layers.1.experts.")}
    assert not opaque & {proven.sources[i].name for i in proven.regions.param}


def test_one_wrong_bit_is_found(loaded: Any) -> None:
    loaded.live["layers.0.norm.weight"].view(torch.int32)[3] ^= 1
    assert list(proof(loaded).opaque_reasons) == ["layers.0.norm.weight"]


def test_a_wrong_constant_is_found(loaded: Any) -> None:
    loaded.live["lm_head.weight"][-1, -1] = -0.0
    assert "constant" in proof(loaded).opaque_reasons["lm_head.weight"]


def test_nan_payloads_are_compared_as_bits(loaded: Any) -> None:
    name = "layers.0.o_proj.weight"
    loaded.tensors[name].fill_(torch.nan)
    loaded.tensors[name].view(torch.int16).fill_(0x7FC1)
    loaded.load_really()
    assert not proof(loaded).opaque_reasons
    loaded.live[name].view(torch.int16)[2, 2] = 0x7FC2
    assert list(proof(loaded).opaque_reasons) == [name]


def test_sources_of_another_shape_are_refused(loaded: Any) -> None:
    loaded.tensors["layers.0.norm.weight"] = torch.zeros(3)
    with pytest.raises(IntegrityError, match=r"norm\.weight was recorded as \(16,\) and is \(3,\)"):
        proof(loaded)


def test_a_tensor_that_went_away_is_opaque(loaded: Any) -> None:
    live = loaded.live
    del live["layers.0.norm.weight"]
    proven = prove(loaded.recipe, live, loaded.tensors.__getitem__, reload_unit=module_of)
    assert list(proven.opaque_reasons) == ["layers.0.norm.weight"]


class Checkpoint:
    """A weight source over tensors in memory."""

    def __init__(self, table: ParamTable, tensors: dict[str, torch.Tensor]) -> None:
        self._table, self._tensors = table, tensors

    def metadata(self) -> ParamTable:
        return self._table

    def regions(self) -> list[SourceRegion]:
        return []

    def read(self, region: SourceRegion, out: memoryview) -> None:
        assert region.box.shape == self._tensors[region.name].shape
        source = self._tensors[region.name].reshape(-1).view(torch.uint8)
        torch.frombuffer(out, dtype=torch.uint8).copy_(source)

    def close(self) -> None:
        return None


def test_proof_by_a_weight_source(loaded: Any) -> None:
    read = whole_tensors(Checkpoint(loaded.table, loaded.tensors))
    proven = prove(loaded.recipe, loaded.live, read, reload_unit=module_of)
    assert proven.proven
    assert not proven.opaque_reasons
    with pytest.raises(IntegrityError, match="nothing is recorded and not in the source"):
        read("nothing")


def test_cache_in_memory(loaded: Any) -> None:
    cache = RecipeCache()
    assert cache.get("layout", loaded.table) is None
    cache.put("layout", loaded.recipe)
    assert cache.get("layout", loaded.table) is loaded.recipe
    assert cache.get("other", loaded.table) is None
    assert cache.get("layout", ParamTable(list(loaded.table)[1:])) is None


def test_cache_in_a_folder(loaded: Any, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    RecipeCache(folder).put("layout", proof(loaded))
    assert folder.stat().st_mode & 0o777 == 0o700
    again = RecipeCache(folder).get("layout", loaded.table)
    assert again is not None
    assert again.key == proof(loaded).key
    assert again.sources == loaded.table
    assert again.proven
    assert RecipeCache(folder).get("other", loaded.table) is None


def damage_digest(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def other_format(data: bytes) -> bytes:
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(data), "format": 99})


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "not msgpack": lambda _: b"\xc1" * 100,
    "one bit": damage_digest,
    "format": other_format,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_ignored(loaded: Any, tmp_path: Path, caplog: Any, how: str) -> None:
    RecipeCache(tmp_path).put("layout", loaded.recipe)
    (path,) = tmp_path.iterdir()
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert RecipeCache(tmp_path).get("layout", loaded.table) is None
    assert str(path) in caplog.text


def test_files_of_another_source_are_ignored(loaded: Any, tmp_path: Path) -> None:
    RecipeCache(tmp_path).put("layout", loaded.recipe)
    (path,) = tmp_path.iterdir()
    other = ParamTable(list(loaded.table)[1:])
    stranger = RecipeCache(tmp_path)
    path.rename(stranger._path("layout", other.key))
    assert stranger.get("layout", other) is None


def test_a_folder_that_cannot_be_written_is_only_logged(loaded: Any, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    cache = RecipeCache(tmp_path / "file")
    cache.put("layout", loaded.recipe)
    assert "cannot be written" in caplog.text
    assert cache.get("layout", loaded.table) is loaded.recipe
