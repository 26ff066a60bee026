"""The store: versions that come, stay complete, and go; sources of live tensors."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from headrace.config import HostSettings
from headrace.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ConnectError,
    LocalProtocolError,
    ManifestMismatchError,
    TransferTimeoutError,
)
from headrace.geometry import Box
from headrace.manifest import HolderAddress, Manifest, SegmentDescriptor
from headrace.protocols import SourceRegion, WeightSource
from headrace.segments import HostSegment, Lender, ahead, borrow
from headrace.store import CheckpointSource, Store, TensorSource, reading
from headrace.store import store as store_module
from headrace.store.layout import ALIGN, Layout
from headrace.types import DTYPES, ParamMeta, ParamTable, dtype_code


class PatternSource:
    """Boxes whose bytes come from the version, the name and the box; can be told to fail or wait."""

    def __init__(self, regions: Sequence[SourceRegion], params: Sequence[ParamMeta]) -> None:
        self.version = 0
        self.fail_at = ""
        self.wait = threading.Event()
        self.wait_at = ""
        self.have, self.params = list(regions), ParamTable(params)

    def metadata(self) -> ParamTable:
        return self.params

    def regions(self) -> Sequence[SourceRegion]:
        return self.have

    def expected(self, region: SourceRegion, version: int, num_bytes: int) -> bytes:
        seed = [version, *region.name.encode(), *region.box.offsets]
        return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8).tobytes()

    def read(self, region: SourceRegion, out: memoryview) -> None:
        if region.name == self.wait_at:
            self.wait.wait(20)
        if region.name == self.fail_at:
            raise CheckpointError(f"{region.name} is gone", name=region.name)
        out[:] = self.expected(region, self.version, len(out))

    def close(self) -> None:
        self.have = []


def pattern_source(count: int = 5) -> PatternSource:
    params = [ParamMeta(f"w{i}", "bfloat16", (6, 5 + i)) for i in range(count)]
    regions = [
        SourceRegion(m.name, Box((row, 0), (3, m.shape[1])))
        for m in params
        for row in (0, 3)
        if m.name != "w1"
    ]
    return PatternSource(
        regions, [*params, ParamMeta("scalar", "float32", ()), ParamMeta("none", "int8", (0, 4))]
    )


def bytes_in(manifest: Manifest, tensors: Sequence[torch.Tensor], row: int) -> bytes:
    """Read one region the way a receiver would: through block, base and strides."""
    table = manifest.regions
    meta = manifest.params[int(table.param[row])]
    rank = max(len(meta.shape), 1)
    kind = getattr(torch, meta.dtype)
    begin, size = int(table.base[row]), kind.itemsize
    shape, strides = table.shape[row, :rank].tolist(), (table.strides[row, :rank] // size).tolist()
    extent = size * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    if 0 in shape:
        return b""
    flat = tensors[table.block[row]][begin : begin + extent].view(kind)
    dense = torch.empty(shape, dtype=kind).copy_(torch.as_strided(flat, shape, strides))
    return dense.view(-1).view(torch.uint8).numpy().tobytes()


def check_version(store: Store, source: PatternSource, version: int) -> None:
    manifest = store.manifest(version, HolderAddress("me"))
    assert (manifest.version, manifest.holder.holder_id) == (version, "me")
    assert len(manifest.regions) == len(source.have)
    boxes = manifest.regions.boxes([len(manifest.params[int(p)].shape) for p in manifest.regions.param])
    for row, (box, region) in enumerate(zip(boxes, source.have, strict=True)):
        assert box == region.box
        got = bytes_in(manifest, store.tensors(version), row)
        assert got == source.expected(region, version, len(got))


def publish(store: Store, source: PatternSource, version: int) -> None:
    source.version = version
    store.publish(version)


def test_versions_take_turns_in_two_sets_of_segments() -> None:
    source = pattern_source()
    source.have += [SourceRegion("scalar", Box((), ())), SourceRegion("none", Box((0, 0), (0, 4)))]
    ids = []
    with Store(source, "holder", segment_bytes=256) as store:
        for version in range(6):
            publish(store, source, version)
            ids.append(tuple(s.segment_id for s in store.manifest(version, HolderAddress("me")).segments))
            assert store.versions == (version,) if version == 0 else (version - 1, version)
            for held in store.versions:
                check_version(store, source, held)
    assert len(ids[0]) > 1
    assert ids[0] == ids[2] == ids[4]
    assert ids[1] == ids[3] == ids[5]
    assert not set(ids[0]) & set(ids[1])


def test_regions_are_aligned_and_segments_bounded() -> None:
    source = pattern_source(40)
    layout = Layout.of(source.metadata(), source.regions(), limit=512)
    assert max(layout.segment_bytes) <= 512
    assert all(slot.begin % ALIGN == 0 for slot in layout.slots)
    ends: dict[int, int] = {}
    for slot in layout.slots:
        assert slot.begin >= ends.get(slot.segment, 0)
        ends[slot.segment] = slot.begin + slot.num_bytes
        assert ends[slot.segment] <= layout.segment_bytes[slot.segment]
    alone = Layout.of(source.metadata(), source.regions(), limit=1)
    assert len(alone.segment_bytes) == len(source.regions())


def test_a_version_must_grow() -> None:
    source = pattern_source()
    with Store(source, "holder") as store:
        publish(store, source, 3)
        for version in (3, 2, -1):
            with pytest.raises(LocalProtocolError, match="does not grow"):
                store.publish(version)
        check_version(store, source, 3)


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_publish_that_fails_leaves_the_newest_alone(before: int) -> None:
    source = pattern_source()
    with Store(source, "holder", num_threads=2) as store:
        for version in range(before):
            publish(store, source, version)
        count = memfds()
        source.fail_at = "w4"
        begin = time.monotonic()
        with pytest.raises(CheckpointError, match="w4 is gone"):
            publish(store, source, 10)
        assert time.monotonic() - begin < 5
        assert 10 not in store.versions
        if before:
            check_version(store, source, before - 1)
        assert memfds() <= count + (before < 2)
        source.fail_at = ""
        publish(store, source, 10)
        check_version(store, source, 10)
        if before:
            check_version(store, source, before - 1)


def memfds() -> int:
    gc.collect()
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(fd.readlink()))
        except OSError:
            continue
    links += Path("/proc/self/maps").read_text().splitlines()  # each segment has a descriptor and a mapping
    return sum("memfd:headrace-holder" in link for link in links) // 2


def test_close_gives_all_memory_back() -> None:
    source = pattern_source()
    store = Store(source, "holder")
    publish(store, source, 0)
    publish(store, source, 1)
    assert memfds() == 2
    store.close()
    store.close()
    assert memfds() == 0
    with pytest.raises(LocalProtocolError, match="closed"):
        store.publish(2)
    with pytest.raises(LocalProtocolError, match="does not hold version 1"):
        store.segments(1)


def test_readers_that_end_late_keep_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host their threads get no core to let go of what they read into."""
    kept = []

    def reading_of(*args: object) -> reading.Reading:
        kept.append(reading.Reading(*args))  # type: ignore[arg-type]
        return kept[-1]

    monkeypatch.setattr(store_module, "Reading", reading_of)
    source = pattern_source()
    with Store(source, "holder") as store:
        publish(store, source, 0)
        publish(store, source, 1)
    assert len(kept) == 2
    assert "memfd:headrace-holder" not in Path("/proc/self/maps").read_text()


def test_released_segments_are_used_again() -> None:
    source = pattern_source()
    with Store(source, "holder") as store:
        for version in range(4):
            publish(store, source, version)
            store.release(version)
            store.release(version)
        assert store.versions == ()
        assert memfds() == 1


def test_a_pinned_version_stays_in_memory_of_its_own_until_it_is_let_go() -> None:
    source = pattern_source()
    with Store(source, "holder") as store:
        for version in range(4):
            publish(store, source, version)
            store.pin(1, pinned=True)
        assert store.versions == (1, 2, 3)
        check_version(store, source, 1)
        store.pin(1, pinned=False)
        publish(store, source, 4)
        assert store.versions == (3, 4)
        for version in store.versions:
            check_version(store, source, version)
        assert memfds() == 2


def test_a_segment_is_found_as_long_as_its_version_is_held() -> None:
    source = pattern_source()
    with Store(source, "holder") as store:
        publish(store, source, 0)
        (segment,) = store.segments(0)
        name = segment.descriptor.segment_id
        assert store.segment(name) is segment
        assert store.segment("another") is None
        store.release(0)
        assert store.segment(name) is None


def test_a_changed_layout_gets_new_segments_and_gives_old_ones_back() -> None:
    source = pattern_source()
    with Store(source, "holder") as store:
        for version in range(3):
            publish(store, source, version)
        source.have = source.have[:3]
        for version in (3, 4, 5):
            publish(store, source, version)
            check_version(store, source, version)
        assert store.versions == (4, 5)
        assert memfds() == 2


def test_a_reader_that_hangs_ends_at_the_deadline_and_its_memory_is_not_reused() -> None:
    source = pattern_source()
    with Store(source, "holder", num_threads=2) as store:
        for version in range(2):
            publish(store, source, version)
        source.wait_at = "w0"
        source.version = 2
        with pytest.raises(TransferTimeoutError, match="deadline"):
            store.publish(2, deadline_s=0.2)
        source.wait_at = ""
        publish(store, source, 3)
        source.version = 77
        source.wait.set()
        time.sleep(0.1)
        check_version(store, source, 3)
        check_version(store, source, 1)


def priority() -> tuple[int, int]:
    """Return the calling thread's scheduling policy and niceness."""
    return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_readers_and_who_makes_memory_give_way_to_whoever_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run where nothing else does; the thread that publishes keeps its priority."""

    source, seen = pattern_source(), set()
    read, make, own = source.read, ahead.make_pages, priority()

    def watched(region: SourceRegion, out: memoryview) -> None:
        seen.add(priority())
        read(region, out)

    def watched_pages(memory: torch.Tensor, *, huge: bool) -> bool:
        seen.add(priority())
        return make(memory, huge=huge)

    monkeypatch.setattr(ahead, "make_pages", watched_pages)
    source.read = watched  # type: ignore[method-assign]
    with Store(source, "holder") as store:
        store.publish(1)
    assert seen == {(os.SCHED_IDLE, own[1])}
    assert priority() == own


def test_readers_that_get_no_core_are_joined_by_some_that_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the one core of this test a process computes without a break; idle threads get 3 of 1,027 parts of it."""

    monkeypatch.setattr(reading, "_PACE_S", 0.2)
    before, seen = os.sched_getaffinity(0), []
    size = 24 << 20
    tensors = {f"w{i}": torch.full((size,), i, dtype=torch.uint8) for i in range(8)}
    source = TensorSource(tensors)
    read = source.read

    def watched(region: SourceRegion, out: memoryview) -> None:
        seen.append(priority())
        read(region, out)

    monkeypatch.setattr(source, "read", watched)
    os.sched_setaffinity(0, {min(before)})
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with Store(source, "holder", num_threads=2) as store:
            store.publish(1)
            held = store.tensors(1)
            assert sorted({int(v) for block in held for v in block[::size].tolist()}) == list(range(8))
    finally:
        busy.kill()
        busy.wait()
        os.sched_setaffinity(0, before)
    assert {policy for policy, _ in seen} == {os.SCHED_IDLE, os.SCHED_OTHER}
    assert {nice for policy, nice in seen if policy == os.SCHED_OTHER} == {10}


@pytest.mark.parametrize(("own", "competing"), [(0, 10), (15, 15)])
def test_who_competes_never_asks_for_more_than_its_process_has(own: int, competing: int) -> None:
    """Without privileges the kernel refuses that, and the read would fail by it."""
    found = []

    def compete() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own)
        reading._compete()
        found.append(priority()[1])

    thread = threading.Thread(target=compete)
    thread.start()
    thread.join()
    assert found == [competing]


def test_only_one_publishes_at_a_time() -> None:
    source = pattern_source()
    source.wait_at = "w0"
    with Store(source, "holder") as store:
        thread = threading.Thread(target=store.publish, args=(1,))
        thread.start()
        while not store._publishing.locked():
            time.sleep(0.001)
        with pytest.raises(LocalProtocolError, match="publishing already"):
            store.publish(2)
        source.wait.set()
        thread.join()


def test_progress_ends_at_all_bytes() -> None:
    source = pattern_source()
    told: list[tuple[int, int]] = []
    with Store(source, "holder") as store:
        published = store.publish(0, lambda done, total: told.append((done, total)))
    assert told[-1] == (published.num_bytes, published.num_bytes)
    assert published.num_bytes == sum(2 * r.box.num_elements for r in source.have)


def test_a_source_that_contradicts_itself_is_refused_whole() -> None:
    source = pattern_source()
    source.have += [SourceRegion("unknown", Box((0,), (1,))), SourceRegion("w0", Box((5, 0), (2, 5)))]
    with Store(source, "holder") as store, pytest.raises(ManifestMismatchError) as error:
        store.publish(0)
    assert len(error.value.differences) == 2


def test_too_little_memory_is_told_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = pattern_source()
    with Store(source, "holder") as store:
        publish(store, source, 0)
        monkeypatch.setattr("headrace.segments.capacity.available_memory_bytes", lambda: 10)
        with pytest.raises(CapacityError, match="release an older version"):
            store.publish(1)
        check_version(store, source, 0)
        store.release(0)
        publish(store, source, 2)
        check_version(store, source, 2)


def test_the_lender_follows_the_store(tmp_path: Path) -> None:
    source = pattern_source()
    settings = HostSettings(socket_dir=tmp_path / "s", permitted_uids=frozenset({os.getuid()}))
    with Lender(settings) as lender:
        store = Store(source, "holder", lender=lender)
        publish(store, source, 0)
        manifest = store.manifest(0, HolderAddress("holder", lender.unix_socket))
        mapped = [borrow(lender.unix_socket, s, 5.0) for s in manifest.segments]
        for row, region in enumerate(source.have):
            got = bytes_in(manifest, [m.tensor for m in mapped], row)
            assert got == source.expected(region, 0, len(got))
        store.close()
        with pytest.raises(ConnectError):
            borrow(lender.unix_socket, manifest.segments[0], 5.0)


def test_a_version_that_cannot_be_lent_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the process may open no more files: the second segment has no descriptor for peers."""
    source, lent = pattern_source(), []
    settings = HostSettings(socket_dir=tmp_path / "s", permitted_uids=frozenset({os.getuid()}))
    with Lender(settings) as lender:
        whole = lender.lend

        def lend(segment: HostSegment) -> SegmentDescriptor:
            if lent:
                raise OSError(24, "Too many open files")
            lent.append(segment)
            return whole(segment)

        with Store(source, "holder", lender=lender, segment_bytes=256) as store:
            monkeypatch.setattr(lender, "lend", lend)
            with pytest.raises(OSError, match="Too many"):
                publish(store, source, 0)
            lent.clear()
            assert memfds() == 0
            monkeypatch.undo()
            publish(store, source, 1)
            check_version(store, source, 1)


def test_a_checkpoint_is_published_bit_for_bit_also_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout.tasks, "__kwdefaults__", {"task_bytes": 1000})
    generator = torch.Generator().manual_seed(5)
    tensors = {f"t{i}": torch.randn(11 * i, 13, generator=generator) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    for part in range(2):
        source = CheckpointSource(tmp_path, parts=2, part=part)
        with Store(source, "holder") as store:
            store.publish(1)
            manifest = store.manifest(1, HolderAddress("h"))
            for row, region in enumerate(source.regions()):
                assert bytes_in(manifest, store.tensors(1), row) == tensors[region.name].numpy().tobytes()
        source.close()


def test_every_version_of_a_checkpoint_is_what_lies_there_then(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    source = CheckpointSource(tmp_path)
    with Store(source, "holder") as store:
        for version in range(1, 4):
            save_file({"w": torch.full((1000,), float(version))}, tmp_path / "next")
            (tmp_path / "next").replace(path)
            store.publish(version)
            assert (store.tensors(version)[0].view(torch.float32)[:1000] == version).all()
    source.close()


def published_tensor(source: TensorSource, name: str) -> torch.Tensor:
    with Store(source, "holder") as store:
        store.publish(0)
        manifest = store.manifest(0, HolderAddress("h"))
        row = [manifest.params[int(p)].name for p in manifest.regions.param].index(name)
        meta = manifest.params[int(manifest.regions.param[row])]
        data = bytearray(bytes_in(manifest, store.tensors(0), row))
    kind = getattr(torch, meta.dtype)
    return (
        torch.frombuffer(data, dtype=kind).view(meta.shape) if data else torch.empty(meta.shape, dtype=kind)
    )


@pytest.mark.parametrize("dtype", [d.name for d in DTYPES])
def test_live_tensors_of_every_dtype_and_stride(dtype: str) -> None:
    kind = getattr(torch, dtype)
    base = torch.from_numpy(np.random.default_rng(1).integers(0, 2, 24 * 40 * kind.itemsize, np.uint8)).view(
        kind
    )
    tensors = {
        "plain": base.view(24, 40),
        "transposed": base.view(24, 40).t(),
        "sliced": base.view(24, 40)[3:17:2, 5:9],
        "scalar": base[7],
        "empty": base[:0],
    }
    source = TensorSource(tensors)
    assert isinstance(source, WeightSource)
    for name, tensor in tensors.items():
        got = published_tensor(source, name)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(got.reshape(-1).view(torch.uint8), raw), name
        assert got.shape == tensor.shape


def test_floats_can_be_published_in_another_dtype() -> None:
    tensors = [
        ("w", torch.randn(5, 7, requires_grad=True)),
        ("i", torch.arange(5)),
        ("q", torch.ones(3).to(torch.float8_e4m3fn)),
    ]
    source = TensorSource(tensors, dtype="bfloat16")
    assert [m.dtype for m in source.metadata()] == ["bfloat16", "int64", "float8_e4m3fn"]
    assert torch.equal(published_tensor(source, "w"), tensors[0][1].detach().bfloat16())
    assert torch.equal(published_tensor(source, "i"), tensors[1][1])
    with pytest.raises(ConfigError, match="floating"):
        TensorSource([], dtype="int8")


def test_tied_tensors_are_published_under_each_name() -> None:
    shared = torch.nn.Parameter(torch.randn(4, 4))
    source = TensorSource({"embed": shared, "head": shared})
    assert torch.equal(published_tensor(source, "embed"), published_tensor(source, "head"))


def test_a_version_is_what_the_tensors_held_when_it_was_published() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    source = TensorSource({"w": parameter})
    with Store(source, "holder") as store:
        for version in range(2):
            store.publish(version)
            parameter.data = torch.full((4,), version + 1.0)
        assert [store.tensors(v)[0][:16].view(torch.float32).tolist() for v in (0, 1)] == [
            [0.0] * 4,
            [1.0] * 4,
        ]
        parameter.data = torch.zeros(5)
        with pytest.raises(CheckpointError, match="reshaped"):
            store.publish(2)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ([("m", torch.empty(2, device="meta"))], "'m' has no data"),
        ([("s", torch.eye(3).to_sparse())], "'s' is sparse"),
        ([("a", torch.ones(1)), ("a", torch.ones(1))], "twice"),
        ([("c", torch.ones(1, dtype=torch.complex64))], "complex64"),
    ],
)
def test_what_cannot_be_published_is_named(tensors: list[tuple[str, torch.Tensor]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TensorSource(tensors)


def test_reads_after_close_or_of_a_wrong_size_are_refused() -> None:
    source = TensorSource({"w": torch.ones(4)})
    region = source.regions()[0]
    with pytest.raises(LocalProtocolError, match="buffer"):
        source.read(region, memoryview(bytearray(3)))
    source.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        source.read(region, memoryview(bytearray(16)))


def test_every_dtype_code_is_a_torch_dtype() -> None:
    assert all(getattr(torch, d.name).itemsize == d.itemsize for d in DTYPES)
    assert dtype_code("bfloat16") == 0
