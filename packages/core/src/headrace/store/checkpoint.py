"""Checkpoints as a WeightSource: a safetensors file, or a folder of them with or without an index."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

from headrace.errors import CheckpointError, ConfigError, LocalProtocolError
from headrace.geometry import Box
from headrace.protocols import SourceRegion
from headrace.store.safetensors_file import FileState, SafetensorsFile, TensorEntry, damaged, state_of
from headrace.types import DTYPES, ParamMeta, ParamTable, dtype_code

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint holds, for people.

    Attributes:
        path: As it was given.
        files: Bytes of each file, by name.
        num_tensors: Number of tensors.
        num_elements: Number of elements in all tensors.
        num_bytes: Bytes of all tensors.
        dtypes: Tensors and bytes per dtype.
        metadata: Metadata of the headers, joined.
        model_type: From `config.json`, empty without it.
        architectures: From `config.json`.
        ignored: Safetensors files of the folder that the index does not name.
    """

    path: str
    files: Mapping[str, int]
    num_tensors: int
    num_elements: int
    num_bytes: int
    dtypes: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]
    model_type: str
    architectures: tuple[str, ...]
    ignored: tuple[str, ...]


class CheckpointSource:
    """Reads a checkpoint; each of `parts` readers takes a contiguous share of about equal bytes.

    Headers are read and checked on construction, and again by `metadata` where files were written anew; tensor bytes
    only by `read`, which belongs to the metadata before it. All parts see equal metadata.

    Args:
        path: A `.safetensors` file, or a folder with `model.safetensors`, `model.safetensors.index.json`
            and its shards, or any safetensors files.
        parts: Number of readers that share the checkpoint.
        part: Which of them this is.

    Attributes:
        reads_parts: Regions may be read in slabs of their first dim.

    Raises:
        CheckpointError: Something is missing, damaged or contradictory; names all that is wrong at once.
    """

    reads_parts = True

    def __init__(self, path: str | Path, parts: int = 1, part: int = 0) -> None:
        if parts < 1 or not 0 <= part < parts:
            raise ConfigError(f"part {part} of {parts} does not exist; parts count from 0", name="part")
        self._path = Path(path)
        self._part = parts, part
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._open()

    def _open(self) -> None:
        around = _around(self._path)
        self._files, self._ignored = _open_all(self._path)
        self._close_files()
        self._around = around
        self._where = {entry.name: (file, entry) for file in self._files for entry in file.entries}
        entries = [entry for file in self._files for entry in file.entries]
        self._params = ParamTable(ParamMeta(entry.name, entry.dtype, entry.shape) for entry in entries)
        mine = _share(entries, *self._part)
        self._regions = tuple(SourceRegion(entry.name, Box.whole(entry.shape)) for entry in mine)

    def metadata(self) -> ParamTable:
        """Return all tensors in the order of their files and bytes, as they lie there now.

        Raises:
            CheckpointError: Files were written anew, and something is wrong with them.
        """
        if _around(self._path) != self._around or not all(file.is_current for file in self._files):
            self._open()
        return self._params

    def regions(self) -> Sequence[SourceRegion]:
        """Return this part's tensors, whole."""
        return self._regions

    def read(self, region: SourceRegion, out: memoryview) -> None:
        """Write a region, or a slab of its first dim, into `out`. Blocking; thread-safe.

        Raises:
            CheckpointError: The file has changed or cannot be read.
        """
        if region.name not in self._where:
            raise LocalProtocolError(f"{self._path} has no tensor {region.name!r}", name=region.name)
        file, entry = self._where[region.name]
        size = DTYPES[dtype_code(entry.dtype)].itemsize
        if not entry.shape:
            begin, length = 0, size
        else:
            row = prod(entry.shape[1:]) * size
            begin, length = region.box.offsets[0] * row, region.box.shape[0] * row
            if region.box.shape[1:] != entry.shape[1:] or begin + length > entry.num_bytes:
                message = f"{region.name}: only slabs of the first dim can be read, not {region.box}"
                raise LocalProtocolError(message, name=region.name)
        if out.nbytes != length:
            message = f"{region.name}: buffer has {out.nbytes} bytes, the region {length}"
            raise LocalProtocolError(message, name=region.name)
        self._read_at(file, entry, entry.begin + begin, out.cast("B") if length else out)

    def _read_at(self, file: SafetensorsFile, entry: TensorEntry, offset: int, out: memoryview) -> None:
        fd, done = self._fd(file.path), 0
        while done < out.nbytes:
            try:
                got = os.preadv(fd, [out[done:]], offset + done)
            except OSError as error:
                reason = error.strerror or str(error)
                message = f"{file.path}: tensor {entry.name!r} cannot be read: {reason}; check the disk"
                raise CheckpointError(message, name=entry.name, retryable=True) from error
            if got == 0:
                message = (
                    f"{file.path}: ends at byte {offset + done}, inside tensor {entry.name!r}; it was cut "
                    "off after it was opened: wait until it is written, then try again"
                )
                raise CheckpointError(message, name=entry.name, retryable=True)
            done += got
        if not file.is_current:
            message = (
                f"{file.path}: was written or replaced while tensor {entry.name!r} was read; wait until the "
                "checkpoint is written, then try again"
            )
            raise CheckpointError(message, name=entry.name, retryable=True)

    def _fd(self, path: Path) -> int:
        with self._lock:
            if self._closed:
                raise LocalProtocolError(f"{self._path} is closed; open it again", name=str(self._path))
            if path not in self._fds:
                try:
                    self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    message = f"{path}: cannot be opened: {error.strerror or error}"
                    raise CheckpointError(message, name=str(path), retryable=True) from error
            return self._fds[path]

    def close(self) -> None:
        """Close the files; idempotent."""
        with self._lock:
            self._closed = True
        self._close_files()

    def _close_files(self) -> None:
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def summary(self) -> CheckpointSummary:
        """Return what the whole checkpoint holds, for `headrace inspect`."""
        entries = [entry for _, entry in self._where.values()]
        tensors = Counter(entry.dtype for entry in entries)
        num_bytes: Counter[str] = Counter()
        for entry in entries:
            num_bytes[entry.dtype] += entry.num_bytes
        config = _config(self._path if self._path.is_dir() else self._path.parent)
        names = config.get("architectures")
        return CheckpointSummary(
            path=str(self._path),
            files={file.path.name: file.num_bytes for file in self._files},
            num_tensors=len(entries),
            num_elements=sum(prod(entry.shape) for entry in entries),
            num_bytes=num_bytes.total(),
            dtypes={dtype: (tensors[dtype], num_bytes[dtype]) for dtype in tensors},
            metadata={key: value for file in self._files for key, value in file.metadata.items()},
            model_type=str(config.get("model_type") or ""),
            architectures=tuple(map(str, names)) if isinstance(names, list) else (),
            ignored=tuple(path.name for path in self._ignored),
        )


def _share(entries: list[TensorEntry], parts: int, part: int) -> list[TensorEntry]:
    """Return the entries whose middle byte falls into this part's share of all bytes."""
    total = sum(entry.num_bytes for entry in entries)
    if not total:
        return entries if part == 0 else []
    ends = accumulate(entry.num_bytes for entry in entries)
    middles = [2 * end - entry.num_bytes for end, entry in zip(ends, entries, strict=True)]
    owners = [min(middle * parts // (2 * total), parts - 1) for middle in middles]
    return [entry for owner, entry in zip(owners, entries, strict=True) if owner == part]


def _around(path: Path) -> tuple[FileState | None, ...]:
    """Return the state of what decides which files belong to a checkpoint."""
    return state_of(path), state_of(path / _INDEX)


def _open_all(path: Path) -> tuple[list[SafetensorsFile], list[Path]]:
    """Return the checked files, and safetensors files of the folder that do not belong to the checkpoint."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint folder or file", name=str(path))
    if not path.is_dir():
        return [SafetensorsFile.open(path)], []
    found = sorted(path.glob("*.safetensors"))
    if (path / _INDEX).exists():
        return _open_indexed(path, found)
    if (path / _SINGLE).exists():
        return [SafetensorsFile.open(path / _SINGLE)], [f for f in found if f.name != _SINGLE]
    if not found:
        others = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth"})[:3])
        hint = f" (found {others}: convert them with save_pretrained)" if others else ""
        message = f"{path} holds no .safetensors file{hint}; give the folder that has them"
        raise CheckpointError(message, name=str(path))
    files = _open_each(path, found)
    _refuse_twice(path, files)
    return files, []


def _open_indexed(folder: Path, found: list[Path]) -> tuple[list[SafetensorsFile], list[Path]]:
    weight_map = _read_index(folder / _INDEX)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        problems = [f"shard {name} is missing" for name in missing]
        raise damaged(folder, problems, "download the missing files")
    files = _open_each(folder, [folder / name for name in names])
    held = {(entry.name, file.path.name) for file in files for entry in file.entries}
    listed = set(weight_map.items())
    problems = [
        f"{file} lacks tensor {name!r}, which the index lists" for name, file in sorted(listed - held)
    ]
    problems += [
        f"{file} has tensor {name!r}, which the index does not" for name, file in sorted(held - listed)
    ]
    if problems:
        raise damaged(
            folder, problems, f"{_INDEX} and shards are of different checkpoints: download both again"
        )
    return files, [path for path in found if path.name not in names]


def _read_index(path: Path) -> dict[str, str]:
    problems: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        counts = Counter(name for name, _ in pairs)
        problems.extend(f"{name!r} occurs twice" for name, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        tree = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(path, [f"is not valid JSON: {error}"]) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", name=str(path)) from error
    weight_map = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, ["has no weight_map"])
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in {"", ".", ".."}:
            problems.append(f"{name!r} lies in {file!r}, which is no file name")
    if problems:
        raise damaged(path, problems)
    return weight_map


def _open_each(folder: Path, paths: Sequence[Path]) -> list[SafetensorsFile]:
    """Open all files; what is wrong with any of them is raised together."""
    files, errors = [], []
    for path in paths:
        try:
            files.append(SafetensorsFile.open(path))
        except CheckpointError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise CheckpointError(f"{folder}: " + " | ".join(map(str, errors)), name=str(folder))
    return files


def _refuse_twice(folder: Path, files: Sequence[SafetensorsFile]) -> None:
    holders: dict[str, list[str]] = {}
    for file in files:
        for entry in file.entries:
            holders.setdefault(entry.name, []).append(file.path.name)
    problems = [f"tensor {n!r} is in {' and '.join(where)}" for n, where in holders.items() if len(where) > 1]
    if problems:
        way_out = f"add {_INDEX}, or remove the files of another checkpoint"
        raise damaged(folder, problems, way_out)


def _config(folder: Path) -> dict[str, object]:
    try:
        tree = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
