"""Checkpoints: every dtype and folder form, every damage, sharing over parts."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from headrace.errors import CheckpointError, ConfigError, LocalProtocolError
from headrace.geometry import Box
from headrace.protocols import SourceRegion, WeightSource
from headrace.store import CheckpointSource, SafetensorsFile

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
          torch.uint16, torch.uint32, torch.uint64]  # fmt: skip


def random_bytes(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, count, np.uint8))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        out.view(-1).view(torch.uint8).copy_(random_bytes(out.nbytes, seed))
    return out


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def read(source: WeightSource, name: str, box: Box | None = None) -> bytes:
    region = next(r for r in source.regions() if r.name == name)
    meta = source.metadata()[source.metadata().index_of(name)]
    size = meta.num_bytes if box is None else meta.num_bytes // prod(meta.shape) * box.num_elements
    out = bytearray(size)
    source.read(region if box is None else SourceRegion(name, box), memoryview(out))
    return bytes(out)


def file_of(header: object, data: bytes = b"", *, raw_header: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw_header is None else raw_header
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_and_shape_is_read_bit_for_bit(tmp_path: Path) -> None:
    shapes = [(3, 5), (), (0, 4), (7,), (2, 3, 2)]
    tensors = {f"{d}.{i}": random_tensor(s, d, i) for d in DTYPES for i, s in enumerate(shapes)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = CheckpointSource(tmp_path)
    assert isinstance(source, WeightSource)
    assert {m.name: (m.dtype, m.shape) for m in source.metadata()} == {
        n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()
    }
    for name, tensor in tensors.items():
        assert read(source, name) == raw(tensor), name
    source.close()


def test_slabs_of_the_first_dim(tmp_path: Path) -> None:
    tensor = torch.randn(9, 4, 3, generator=torch.Generator().manual_seed(0))
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    source = CheckpointSource(tmp_path / "w.safetensors")
    assert read(source, "w", Box((2, 0, 0), (5, 4, 3))) == raw(tensor[2:7])
    for box in (Box((0, 1, 0), (9, 3, 3)), Box((8, 0, 0), (2, 4, 3))):
        with pytest.raises(LocalProtocolError, match="slabs"):
            read(source, "w", box)
    with pytest.raises(LocalProtocolError, match="buffer"):
        source.read(source.regions()[0], memoryview(bytearray(3)))
    with pytest.raises(LocalProtocolError, match="no tensor"):
        source.read(SourceRegion("x", Box((), ())), memoryview(bytearray(3)))
    source.close()
    source.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        read(source, "w")


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tensors = [random_tensor((4, i + 1), torch.float32, i) for i in range(4)]
    return sharded(
        tmp_path / "m", {ONE: {"a": tensors[0], "b": tensors[1]}, TWO: {"c": tensors[2], "d": tensors[3]}}
    )


def test_shards_with_an_index(shards: Path) -> None:
    save_file({"a": torch.zeros(1)}, shards / "consolidated.safetensors")
    (shards / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    source = CheckpointSource(shards)
    assert [m.name for m in source.metadata()] == ["a", "b", "c", "d"]
    assert read(source, "d") == raw(random_tensor((4, 4), torch.float32, 3))
    summary = source.summary()
    assert (summary.num_tensors, summary.num_elements, summary.num_bytes) == (4, 40, 160)
    assert summary.dtypes == {"float32": (4, 160)}
    assert summary.ignored == ("consolidated.safetensors",)
    assert (summary.model_type, summary.architectures) == ("qwen3", ("Qwen3ForCausalLM",))
    assert list(summary.files) == [ONE, TWO]


def test_shards_without_an_index(shards: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    assert {m.name for m in CheckpointSource(shards).metadata()} == set("abcd")
    save_file({"c": torch.zeros(1), "a": torch.zeros(1)}, shards / "other.safetensors")
    with pytest.raises(CheckpointError) as error:
        CheckpointSource(shards)
    assert "'a' is in" in str(error.value)
    assert "'c' is in" in str(error.value)
    assert CheckpointSource(shards / "other.safetensors").summary().num_tensors == 2


def test_model_safetensors_alone_counts(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    source = CheckpointSource(tmp_path)
    assert read(source, "a") == raw(torch.ones(2))
    assert source.summary().ignored == ("consolidated.safetensors",)


def edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    tree = json.loads(path.read_text())
    edit(tree["weight_map"])
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (
            lambda m: m.update(e="missing-1.safetensors", f="missing-2.safetensors"),
            ["missing-1", "missing-2", "download"],
        ),
        (lambda m: m.update(e=ONE, f=TWO), [f"{ONE} lacks tensor 'e'", f"{TWO} lacks tensor 'f'"]),
        (lambda m: (m.pop("a"), m.pop("c")), ["has tensor 'a'", "has tensor 'c'"]),
        (lambda m: m.update(a=TWO), [f"{TWO} lacks tensor 'a'", f"{ONE} has tensor 'a'"]),
        (lambda m: m.update(a="../secret.safetensors", b=7), ["'a' lies in '../secret", "'b' lies in 7"]),
        (lambda m: m.clear(), ["no weight_map"]),
    ],
)
def test_an_index_that_does_not_fit_lists_all_differences(
    shards: Path, edit: Callable[[dict[str, str]], None], told: list[str]
) -> None:
    edit_index(shards, edit)
    with pytest.raises(CheckpointError) as error:
        CheckpointSource(shards)
    for text in told:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "weight_map"),
        (f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}', "'a' occurs twice"),
    ],
)
def test_a_broken_index(shards: Path, text: str, told: str) -> None:
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=told):
        CheckpointSource(shards)


def test_damage_in_several_shards_is_told_together(shards: Path) -> None:
    for name in (ONE, TWO):
        with (shards / name).open("r+b") as file:
            file.truncate(20)
    with pytest.raises(CheckpointError) as error:
        CheckpointSource(shards)
    assert ONE in str(error.value)
    assert TWO in str(error.value)


F32 = entry("F32", [2], 0, 8)
DAMAGED = {
    "empty file": (b"", "too few"),
    "five bytes": (b"12345", "too few"),
    "header too large": ((1 << 40).to_bytes(8, "little") + b"{}", "at most"),
    "a text file": (b"hello, this is no checkpoint at all", "at most"),
    "cut in the header": (file_of({"a": F32})[:15], "inside its header"),
    "cut in a tensor": (file_of({"a": F32}, b"1234567"), r"'a' ends at byte"),
    "bytes too many": (file_of({"a": F32}, b"123456789"), "belong to no tensor"),
    "no JSON": (file_of(None, raw_header=b"{nope}"), "JSON"),
    "not UTF-8": (file_of(None, raw_header=b'{"\xff\xff": 1}'), "JSON"),
    "too deep": (file_of(None, raw_header=b"[" * 100_000), "JSON"),
    "a list": (file_of([1]), "object"),
    "an empty header": (file_of(None, raw_header=b""), "object"),
    "name twice": (
        file_of(None, b"12345678", raw_header=b'{"a": %b, "a": %b}' % ((json.dumps(F32).encode(),) * 2)),
        "'a' occurs twice",
    ),
    "unknown dtype": (file_of({"a": entry("F4", [2], 0, 1)}, b"1"), "dtype 'F4'; known"),
    "dtype is no text": (file_of({"a": entry(["F4"], [2], 0, 1)}, b"1"), "dtype"),  # type: ignore[arg-type]
    "wrong size": (file_of({"a": entry("F32", [3], 0, 8)}, b"12345678"), "needs 12"),
    "negative shape": (file_of({"a": entry("F32", [-2, -1], 0, 8)}, b"12345678"), "shape"),
    "shape of true": (file_of({"a": entry("U8", [True], 0, 1)}, b"1"), "shape"),
    "fractional offsets": (file_of({"a": entry("F32", [2], 0, 8.5)}, b"12345678"), "offsets"),  # type: ignore[arg-type]
    "reversed offsets": (file_of({"a": entry("F32", [2], 8, 0)}, b"12345678"), "offsets"),
    "one offset": (
        file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, b"12345678"),
        "offsets",
    ),
    "fields missing": (file_of({"a": {"dtype": "F32"}}), "exactly"),
    "fields too many": (file_of({"a": F32 | {"extra": 1}}, b"12345678"), "exactly"),
    "entry is a number": (file_of({"a": 3}), "exactly"),
    "overlap": (file_of({"a": F32, "b": entry("F32", [2], 4, 12)}, b"x" * 12), "overlap"),
    "same bytes twice": (file_of({"a": F32, "b": F32}, b"x" * 8), "overlap"),
    "hole": (file_of({"a": F32, "b": entry("F32", [1], 12, 16)}, b"x" * 16), "before tensor 'b' belong"),
    "hole in front": (file_of({"a": entry("F32", [1], 4, 8)}, b"x" * 8), "before tensor 'a' belong"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_every_damage_names_the_file_and_the_fault(tmp_path: Path, kind: str) -> None:
    content, told = DAMAGED[kind]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=told) as error:
        CheckpointSource(path)
    assert str(path) in str(error.value)
    assert error.value.name == str(path)


def test_all_bad_tensors_are_named_at_once(tmp_path: Path) -> None:
    header = {"good": F32} | {f"bad{i}": entry("F32", [3], 0, 8) for i in range(30)}
    (tmp_path / "x.safetensors").write_bytes(file_of(header, b"12345678"))
    with pytest.raises(CheckpointError, match=r"bad0.*bad19.*and 10 more"):
        CheckpointSource(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_never_worse(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(file_of({"a": F32, "b": entry("BF16", [2, 2], 8, 16)}, b"x" * 16))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) - 8, len(content))) :]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    try:
        found = SafetensorsFile.open(path)
    except CheckpointError:
        return
    assert all(8 <= e.begin <= e.end <= len(content) for e in found.entries)
    assert sum(e.num_bytes for e in found.entries) == len(content) - 8 - int.from_bytes(content[:8], "little")


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    source = CheckpointSource(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"inside tensor 'a'") as error:
        source.read(source.regions()[0], memoryview(bytearray(4000)))
    assert error.value.retryable
    with pytest.raises(CheckpointError, match="is cut off"):
        source.metadata()
    save_file({"a": torch.ones(1000)}, path)
    assert read(source, "a") == raw(torch.ones(1000))
    source.close()


def replace_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    save_file(tensors, path.with_suffix(".new"), metadata)
    path.with_suffix(".new").replace(path)


def write_in_place(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    replace_file(path.with_suffix(".other"), tensors, metadata)
    path.write_bytes(path.with_suffix(".other").read_bytes())


@pytest.mark.parametrize("write", [replace_file, write_in_place])
@pytest.mark.parametrize("read_before", [False, True])
def test_a_file_written_anew_is_opened_anew_and_never_mixed_with_the_old_one(
    tmp_path: Path, write: Callable[..., None], read_before: bool
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    source = CheckpointSource(tmp_path)
    whole = source.regions()[0]
    if read_before:
        source.read(whole, memoryview(bytearray(4000)))
    write(path, {"a": torch.ones(1000)}, {"longer": "header" * 10})
    with pytest.raises(CheckpointError, match=r"written or replaced while tensor 'a'") as error:
        source.read(whole, memoryview(bytearray(4000)))
    assert error.value.retryable
    assert read(source, "a") == raw(torch.ones(1000))
    write(path, {"b": torch.ones(3), "a": torch.zeros(2)}, {})
    assert [meta.name for meta in source.metadata()] == [region.name for region in source.regions()]
    assert read(source, "b") == raw(torch.ones(3))
    source.close()


def test_another_index_is_followed(shards: Path) -> None:
    source = CheckpointSource(shards)
    names = {meta.name for meta in source.metadata()}
    (shards / "model.safetensors.index.json").unlink()
    save_file({"new": torch.ones(2)}, shards / "more.safetensors")
    assert {meta.name for meta in source.metadata()} == {*names, "new"}
    assert read(source, "new") == raw(torch.ones(2))
    source.close()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor((1000,), torch.int32, 1)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:77]], at))
    assert read(CheckpointSource(tmp_path), "a") == raw(tensor)


def test_a_disk_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match="Input/output"):
        read(CheckpointSource(tmp_path), "a")


def test_folders_without_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointSource(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no .safetensors file; give"):
        CheckpointSource(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="convert"):
        CheckpointSource(tmp_path)
    with pytest.raises(ConfigError):
        CheckpointSource(tmp_path, parts=2, part=2)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_parts_share_all_tensors_in_order(tmp_path: Path, parts: int) -> None:
    tensors = {f"{i:02}": torch.zeros(3 + i * 17 % 23, 8) for i in range(30)} | {"99": torch.zeros(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    sources = [CheckpointSource(tmp_path, parts, part) for part in range(parts)]
    names = [region.name for source in sources for region in source.regions()]
    assert names == [meta.name for meta in sources[0].metadata()]
    assert len({source.metadata().key for source in sources}) == 1
    shares = [sum(4 * region.box.num_elements for region in source.regions()) for source in sources]
    largest = 4 * 8 * 25
    assert max(shares) <= sum(shares) / parts + largest


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    tensors = {str(i): random_tensor((100, 50), torch.int16, i) for i in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = CheckpointSource(tmp_path)
    wrong: list[str] = []

    def check(names: list[str]) -> None:
        wrong.extend(n for n in names if read(source, n) != raw(tensors[n]))

    threads = [threading.Thread(target=check, args=(list(tensors)[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.close()
    assert wrong == []
