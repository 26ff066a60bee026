"""Host segments: seals, mappings, populate, and the memory that may be taken."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from headrace.errors import (
    CapacityError,
    ConfigError,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from headrace.manifest import SegmentDescriptor
from headrace.segments import (
    HostSegment,
    MappedSegment,
    available_memory_bytes,
    host_segments,
    require_memory,
)
from headrace.segments.host import unsealed

SIZE = 3 * 4096 + 100


def memfds(name: str, pid: int | str = "self") -> int:
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(str(fd.readlink()))
        except OSError:
            continue
    links += Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum(name in link for link in links)


def test_a_mapping_sees_what_the_owner_writes() -> None:
    with HostSegment(SIZE) as owner, MappedSegment(owner.fd, owner.descriptor) as mapped:
        owner.tensor.copy_(torch.arange(SIZE) % 251)
        assert mapped.tensor.dtype == torch.uint8
        assert mapped.tensor.shape == (SIZE,)
        assert torch.equal(mapped.tensor, owner.tensor)
        assert owner.descriptor.kind == "host"
        assert len(owner.descriptor.segment_id) == 32


def test_the_size_is_sealed() -> None:
    with HostSegment(SIZE) as owner:
        seals = fcntl.fcntl(owner.fd, fcntl.F_GET_SEALS)
        wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        assert seals & wanted == wanted
        for size in (0, SIZE + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(owner.fd, size)


def test_a_segment_can_be_written_by_its_descriptor_until_it_is_sealed() -> None:
    with HostSegment(SIZE, sealed=False) as owner:
        assert unsealed(owner.tensor) is owner
        assert unsealed(owner.tensor[1:]) is None
        content = bytes(range(1, 201)) * 30
        owner.write(4000, memoryview(content))
        assert owner.tensor[4000:10000].numpy().tobytes() == content
        assert not owner.tensor[:4000].any()
        assert not owner.tensor[10000:].any()
        with pytest.raises(CapacityError):
            owner.write(SIZE - 1, memoryview(b"12"))
        owner.seal()
        owner.seal()
        assert unsealed(owner.tensor) is None
        with pytest.raises(LocalProtocolError, match="sealed"):
            owner.write(0, memoryview(b"1"))
        with pytest.raises(TransportError, match="writable"):
            MappedSegment(owner.fd, owner.descriptor, writable=True)
        owner.tensor[0] = 7


def test_a_closed_segment_is_written_no_more() -> None:
    owner = HostSegment(SIZE, sealed=False)
    memory = owner.tensor
    owner.close()
    assert unsealed(memory) is None
    with pytest.raises(LocalProtocolError):
        owner.write(0, memoryview(b"1"))


def test_only_segments_for_peers_can_be_mapped_writable() -> None:
    with HostSegment(SIZE) as owner, pytest.raises(TransportError, match="writable"):
        MappedSegment(owner.fd, owner.descriptor, writable=True)
    with HostSegment(SIZE, peers_write=True) as owner:
        MappedSegment(owner.fd, owner.descriptor, writable=True).tensor.fill_(7)
        assert bool((owner.tensor == 7).all())


def test_the_file_descriptor_cannot_be_written_by_a_peer() -> None:
    with HostSegment(SIZE) as owner, pytest.raises(PermissionError):
        os.pwrite(owner.fd, b"x", 0)


def test_views_outlive_close_and_nothing_else_does() -> None:
    owner = HostSegment(SIZE, "headrace-outlive")
    view = owner.tensor[10:20].fill_(5)
    mapped = MappedSegment(owner.fd, owner.descriptor)
    other = mapped.tensor[10:20]
    owner.close()
    owner.close()
    mapped.close()
    mapped.close()
    assert view.tolist() == other.tolist() == [5] * 10
    with pytest.raises(LocalProtocolError, match="closed"):
        _ = owner.tensor
    with pytest.raises(LocalProtocolError, match="closed"):
        _ = mapped.tensor
    del view, other
    assert memfds("headrace-outlive") == 0


def resident_bytes(address: int) -> int:
    """Return what `/proc/self/smaps` says is mapped in the area that begins at `address`."""
    area = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:") and area.startswith(f"{address:x}-"):
            return int(line.split()[1]) * 1024
        if "-" in line.split(" ", 1)[0]:
            area = line
    return -1


@pytest.mark.parametrize("fallback", [False, True])
def test_populate_brings_every_page_in(fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fallback:
        monkeypatch.setattr("headrace.segments.pages.libc.madvise", lambda *_: -1)
        monkeypatch.setattr("headrace.segments.pages.ctypes.get_errno", lambda: errno.EINVAL)
    steps = []
    with HostSegment(64 * 4096 + 5) as owner:
        owner.tensor.fill_(1)
        with MappedSegment(owner.fd, owner.descriptor) as mapped:
            mapped.populate(16 * 4096, lambda: steps.append(1))
            assert resident_bytes(mapped.tensor.data_ptr()) == 65 * 4096
    assert len(steps) == 5


def test_populate_reports_the_kernel_and_stops_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with HostSegment(8 * 4096) as owner, MappedSegment(owner.fd, owner.descriptor) as mapped:

        def stop() -> None:
            raise LocalProtocolError("stop")

        with pytest.raises(LocalProtocolError, match="stop"):
            mapped.populate(4096, stop)
        monkeypatch.setattr("headrace.segments.pages.libc.madvise", lambda *_: -1)
        monkeypatch.setattr("headrace.segments.pages.ctypes.get_errno", lambda: errno.ENOMEM)
        with pytest.raises(TransportError, match="memory"):
            mapped.populate()


def test_memory_that_could_shrink_is_refused(tmp_path: Path) -> None:
    descriptor = SegmentDescriptor("x", SIZE)
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, SIZE)
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    try:
        for fd in (loose, file):
            with pytest.raises(RemoteProtocolError, match="sealed"):
                MappedSegment(fd, descriptor)
    finally:
        os.close(loose)
        os.close(file)
    with HostSegment(SIZE) as owner, pytest.raises(RemoteProtocolError, match=f"{SIZE} bytes"):
        MappedSegment(owner.fd, SegmentDescriptor("x", SIZE + 1))


@pytest.mark.parametrize("size", [0, -1])
def test_empty_segments_are_refused(size: int) -> None:
    with pytest.raises(ConfigError):
        HostSegment(size)


def test_too_much_is_refused_before_it_is_taken() -> None:
    with pytest.raises(CapacityError, match=r"needs .* GiB .* available"):
        HostSegment(1 << 50, "weights")
    require_memory(
        1 << 50,
        "nobody knows how much there is",
        available=None if available_memory_bytes() is None else 1 << 51,
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n"}


def test_segments_are_made_all_or_none() -> None:
    two = host_segments([4096, 1], "all-or-none")
    assert [segment.descriptor.num_bytes for segment in two] == [4096, 1]
    before = memfds("all-or-none")
    with pytest.raises(CapacityError):
        host_segments([4096, 1 << 60], "all-or-none")
    assert memfds("all-or-none") == before
    for segment in two:
        segment.close()


def test_cgroup_v2_limits_count_with_reclaimable_cache(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": "2000000\n",
            "sys/fs/cgroup/a/memory.current": "1900000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 400000\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": "7\n",
        },
    )
    assert available_memory_bytes(root) == 500_000


def test_cgroup_v1_and_containers_whose_path_is_not_mounted(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "4:memory:/docker/x\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 1\n",
        },
    )
    assert available_memory_bytes(root) == 2_000_001
    assert available_memory_bytes(write(tmp_path / "plain", MEMINFO)) == 5000 * 1024
    assert available_memory_bytes(tmp_path / "nothing") is None
