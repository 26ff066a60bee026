"""One safetensors file: its header, distrusted and checked whole, and where every tensor's bytes lie.

u64 header length | JSON header | tensor bytes, back to back, without holes        little-endian
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

from headrace.errors import CheckpointError
from headrace.types import DTYPES, dtype_code

MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_SHOWN = 20
_NAMES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "BOOL": "bool",
}


FileState = tuple[int, int, int, int]


def state_of(path: Path) -> FileState | None:
    """Return what is another where a file was written again or replaced; None where there is none."""
    try:
        return _state(path.stat())
    except OSError:
        return None


def _state(found: os.stat_result) -> FileState:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: its bytes are `[begin, end)` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked file: entries in the order of their bytes.

    Attributes:
        path: The file.
        entries: Tensors, by rising `begin`.
        metadata: The header's `__metadata__`.
        num_bytes: Size of the file.
        state: What `state_of` returned when the header was read.
    """

    path: Path
    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    num_bytes: int
    state: FileState

    @property
    def is_current(self) -> bool:
        """Whether what lies under `path` is still what was opened."""
        return state_of(self.path) == self.state

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read and check the header; tensor bytes are not read.

        Raises:
            CheckpointError: The file cannot be read or breaks the format; names it and all bad tensors.
        """
        header, data_begin, num_bytes, state = _read_header(path)
        metadata, entries, problems = _parse(header, data_begin)
        entries.sort(key=lambda entry: (entry.begin, entry.end))
        problems += _placement_problems(entries, data_begin, num_bytes)
        if problems:
            raise damaged(path, problems)
        return cls(path, tuple(entries), metadata, num_bytes, state)


def damaged(path: Path, problems: list[str], way_out: str = "download or write it again") -> CheckpointError:
    """Return the error that lists what is wrong with a file or folder."""
    shown = "; ".join(problems[:_SHOWN])
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return CheckpointError(f"{path}: {shown}{more}; {way_out}", name=str(path))


def _read_header(path: Path) -> tuple[bytes, int, int, FileState]:
    """Return the JSON bytes, where tensor bytes begin, the file's size and state."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            num_bytes = found.st_size
            head = file.read(_LENGTH_BYTES)
            length = int.from_bytes(head, "little")
            begin = _LENGTH_BYTES + length
            if len(head) < _LENGTH_BYTES:
                raise damaged(path, [f"has {num_bytes} bytes, too few for a safetensors file"])
            if length > MAX_HEADER_BYTES:
                problem = f"announces a header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed"
                raise damaged(path, [problem], "it is no safetensors file, or damaged")
            header = file.read(length) if begin <= num_bytes else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}", name=str(path)) from error
    if len(header) < length:
        raise damaged(
            path, [f"is cut off inside its header: {num_bytes} bytes, the header alone ends at {begin}"]
        )
    return header, begin, num_bytes, _state(found)


def _parse(header: bytes, data_begin: int) -> tuple[dict[str, str], list[TensorEntry], list[str]]:
    problems: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        counts = Counter(name for name, _ in pairs)
        problems.extend(f"{name!r} occurs twice in the header" for name, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        tree = json.loads(header, object_pairs_hook=unique) if header else None
    except (ValueError, RecursionError) as error:
        return {}, [], [f"header is not valid JSON: {error}"]
    if not isinstance(tree, dict):
        return {}, [], ["header is not a JSON object"]
    metadata = tree.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append("__metadata__ is not a map from text to text")
        metadata = {}
    entries = []
    for name, fields in tree.items():
        entry = _entry(name, fields, data_begin)
        if isinstance(entry, TensorEntry):
            entries.append(entry)
        else:
            problems.append(f"tensor {name!r} {entry}")
    return metadata, entries, problems


def _entry(name: str, fields: object, data_begin: int) -> TensorEntry | str:
    """Return the entry, or what is wrong with it."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        return "does not have exactly dtype, shape and data_offsets"
    shape, offsets, dtype = fields["shape"], fields["data_offsets"], fields["dtype"]
    if not _naturals(shape):
        return f"has the shape {shape!r}"
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the offsets {offsets!r}"
    known = _NAMES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        return f"has the dtype {dtype!r}; known are {', '.join(_NAMES)}"
    expected = prod(shape) * DTYPES[dtype_code(known)].itemsize
    begin, end = offsets
    if end - begin != expected:
        return f"has {end - begin} bytes, its shape {shape} in {dtype} needs {expected}"
    return TensorEntry(name, known, tuple(shape), data_begin + begin, data_begin + end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _placement_problems(entries: list[TensorEntry], data_begin: int, num_bytes: int) -> list[str]:
    """Check that entries, sorted, fill `[data_begin, num_bytes)` back to back."""
    problems = [
        f"is cut off: tensor {e.name!r} ends at byte {e.end}, the file has {num_bytes}"
        for e in entries
        if e.end > num_bytes
    ]
    for before, after in pairwise(entries):
        if after.begin < before.end:
            problems.append(f"tensors {before.name!r} and {after.name!r} overlap at byte {after.begin}")
        elif after.begin > before.end:
            problems.append(
                f"bytes [{before.end}, {after.begin}) before tensor {after.name!r} belong to no tensor"
            )
    first, last = (entries[0].begin, entries[-1].end) if entries else (data_begin, data_begin)
    if first > data_begin:
        problems.append(
            f"bytes [{data_begin}, {first}) before tensor {entries[0].name!r} belong to no tensor"
        )
    if last < num_bytes:
        problems.append(f"bytes [{last}, {num_bytes}) at the end belong to no tensor")
    return problems
