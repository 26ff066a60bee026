"""Random models, shardings and recipes, and a numpy interpreter of plans: the planner's oracle."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import as_strided

from headrace.geometry import Box, RegionTable, boxes_of_flat_range, contiguous_strides
from headrace.manifest import HolderAddress, Manifest, SegmentDescriptor
from headrace.plan import MAPPED_MODES, CopyTable, TransferPlan, UpdatePlan
from headrace.recipe import FillTable, LoadRecipe
from headrace.types import DTYPE_CODES, DTYPES, ParamMeta, ParamTable

NUMPY = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "int32": np.int32,
    "uint8": np.uint8,
}
GUARD = 0xEE


def numpy_dtype(code: int) -> np.dtype:
    """Return the numpy dtype of a table code."""
    return np.dtype(NUMPY[DTYPES[code].name])


@dataclass
class World:
    """One random situation: values, who holds them, who needs them, and what must come out."""

    values: dict[str, np.ndarray]
    manifests: list[Manifest]
    segments: list[list[np.ndarray]]
    recipe: LoadRecipe
    expected: list[np.ndarray]

    @property
    def opaque(self) -> list[np.ndarray]:
        """Return what each opaque buffer must hold."""
        return [self.values[self.recipe.sources[i].name] for i in self.recipe.opaque.tolist()]


def make_world(seed: int, *, num_holders: int = 3, overlaps: bool = False, extent: int = 9) -> World:
    """Build a world from a seed: one to six parameters of up to three dims, each below `extent`."""
    rng = np.random.default_rng(seed)
    metas, values = [], {}
    for i in range(int(rng.integers(1, 7))):
        shape = tuple(
            int(n) for n in rng.integers(0 if rng.random() < 0.1 else 1, extent, rng.integers(0, 4))
        )
        dtype = str(rng.choice(["float16", "float32"]))
        metas.append(ParamMeta(f"p{i}", dtype, shape))
        values[f"p{i}"] = rng.standard_normal(shape).astype(NUMPY[dtype])
    params = ParamTable(metas)
    held = [[] for _ in range(num_holders)]
    for i, meta in enumerate(metas):
        for holder, box in _placement(rng, meta, num_holders, overlaps):
            held[holder].append((i, box))
    pairs = [_publish(rng, params, values, rows, f"h{h}") for h, rows in enumerate(held)]
    recipe, expected = _recipe(rng, params, values)
    return World(values, [m for m, _ in pairs], [s for _, s in pairs], recipe, expected)


def _placement(
    rng: np.random.Generator, meta: ParamMeta, num_holders: int, overlaps: bool
) -> list[tuple[int, Box]]:
    """Return who holds which box of one parameter; together they hold everything."""
    kind = rng.choice(["whole", "rows", "columns", "flat", "grid", "replicated"])
    whole = Box.whole(meta.shape)
    if kind == "whole" or not meta.shape:
        found = [(int(rng.integers(num_holders)), whole)]
    elif kind == "replicated":
        found = [(h, whole) for h in range(num_holders) if h == 0 or rng.random() < 0.7]
    elif kind == "flat":
        cuts = np.sort(rng.integers(0, meta.num_elements + 1, num_holders - 1))
        edges = [0, *cuts.tolist(), meta.num_elements]
        found = [
            (h, b)
            for h in range(num_holders)
            for b in boxes_of_flat_range(meta.shape, edges[h], edges[h + 1])
        ]
    else:
        dims = {"rows": [0], "columns": [len(meta.shape) - 1], "grid": list(range(len(meta.shape)))}[
            str(kind)
        ]
        boxes = [whole]
        for dim in dims:
            boxes = [part for box in boxes for part in _split(rng, box, dim, num_holders)]
        found = [(i % num_holders, box) for i, box in enumerate(boxes)]
        found += [(int(rng.integers(num_holders)), box) for box in boxes if rng.random() < 0.3]
    if overlaps and meta.shape:
        found += [(int(rng.integers(num_holders)), _some_box(rng, meta.shape)) for _ in range(2)]
    return list(dict.fromkeys(found))


def _split(rng: np.random.Generator, box: Box, dim: int, parts: int) -> list[Box]:
    edges = [0, *np.sort(rng.integers(0, box.shape[dim] + 1, parts - 1)).tolist(), box.shape[dim]]
    out = []
    for begin, end in itertools.pairwise(edges):
        offsets, shape = list(box.offsets), list(box.shape)
        offsets[dim], shape[dim] = box.offsets[dim] + begin, end - begin
        out.append(Box(tuple(offsets), tuple(shape)))
    return out


def _some_box(rng: np.random.Generator, shape: tuple[int, ...]) -> Box:
    low = [int(rng.integers(0, n + 1)) for n in shape]
    return Box(tuple(low), tuple(int(rng.integers(0, n - lo + 1)) for n, lo in zip(shape, low, strict=True)))


def _publish(
    rng: np.random.Generator,
    params: ParamTable,
    values: dict[str, np.ndarray],
    rows: list[tuple[int, Box]],
    name: str,
) -> tuple[Manifest, list[np.ndarray]]:
    """Lay boxes out in one or two segments, some of them transposed."""
    sizes, table = [0, 0], []
    for param, box in rows:
        item = DTYPES[DTYPE_CODES[params[param].dtype]].itemsize
        block = int(rng.integers(2))
        base = -(-sizes[block] // 8) * 8
        strides = contiguous_strides(box.shape, item)
        if rng.random() < 0.3:
            strides = tuple(reversed(contiguous_strides(tuple(reversed(box.shape)), item)))
        table.append((param, box, block, base, strides))
        sizes[block] = base + box.num_elements * item
    segments = [np.full(size, GUARD, np.uint8) for size in sizes]
    for param, box, block, base, strides in table:
        value = values[params[param].name]
        part = value[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))]
        if part.size:
            view(segments[block], base, box.shape, strides, value.dtype)[...] = part
    descriptors = tuple(SegmentDescriptor(f"{name}/{i}", size) for i, size in enumerate(sizes))
    address = HolderAddress(name, tcp_endpoint="127.0.0.1:1")
    return Manifest(address, 1, params, descriptors, RegionTable.from_rows(table)), segments


def _recipe(
    rng: np.random.Generator, params: ParamTable, values: dict[str, np.ndarray]
) -> tuple[LoadRecipe, list[np.ndarray]]:
    """Need a random box of most parameters, some transposed, some cast, some fused, some opaque."""
    targets: list[ParamMeta] = []
    rows: list[tuple[int, Box, int, int, tuple[int, ...]]] = []
    expected: list[np.ndarray] = []
    opaque = [i for i in range(len(params)) if rng.random() < 0.25]
    for i, meta in enumerate(params):
        if i in opaque and rng.random() < 0.7:
            continue
        box = Box.whole(meta.shape) if rng.random() < 0.4 else _some_box(rng, meta.shape)
        part = values[meta.name][tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))]
        dtype = str(rng.choice(["float16", "float32", meta.dtype]))
        flip, gap = bool(rng.random() < 0.4), int(rng.integers(0, 3))
        local = part.T if flip else part
        full = (*local.shape[:-1], local.shape[-1] + gap) if local.ndim else ()
        target = np.full(full, 7, NUMPY[dtype])
        target[tuple(slice(n) for n in local.shape)] = local.astype(NUMPY[dtype])
        steps = contiguous_strides(full, target.itemsize)
        rows.append((i, box, len(targets), 0, tuple(reversed(steps)) if flip else steps))
        targets.append(ParamMeta(f"t{i}", dtype, full))
        expected.append(target)
    recipe = LoadRecipe(
        params, ParamTable(targets), RegionTable.from_rows(rows), FillTable.empty(),
        np.array(opaque, np.int32), np.zeros(0, np.int32), {},
    )  # fmt: skip
    return recipe, expected


def view(
    memory: np.ndarray, base: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype | type
) -> np.ndarray:
    """Return a strided window on bytes, refusing to look outside of them."""
    item = np.dtype(dtype).itemsize
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if base < 0 or min(strides, default=0) < 0 or base + reach + item > len(memory):
        raise IndexError(f"[{base}, {base + reach + item}) is not inside {len(memory)} bytes")
    aligned = np.frombuffer(memory.data, np.uint8)[base : base + reach + item]
    raw = as_strided(aligned, (*shape, item), (*strides, 1))
    return _Window(raw, np.dtype(dtype))


class _Window:
    """Elements at any byte; numpy cannot view them where the last dim of bytes is not dense."""

    def __init__(self, raw: np.ndarray, dtype: np.dtype) -> None:
        self._raw, self._dtype = raw, dtype

    def __setitem__(self, _: object, value: np.ndarray) -> None:
        data = np.ascontiguousarray(value, self._dtype)
        self._raw[...] = data.reshape(*self._raw.shape[:-1], 1).view(np.uint8)

    def get(self) -> np.ndarray:
        """Return the elements as an array of their own."""
        return np.ascontiguousarray(self._raw).view(self._dtype)[..., 0]

    def count(self) -> None:
        """Add one to every byte."""
        self._raw[...] += 1


def run_copies(
    table: CopyTable,
    rows: slice,
    sources: list[np.ndarray],
    blocks: list[np.ndarray],
    counts: list[np.ndarray],
) -> None:
    """Execute copies on byte arrays and count the writes to each destination byte."""
    for i in range(*rows.indices(len(table))):
        shape = tuple(table.shape[i].tolist())
        src_dtype, dst_dtype = numpy_dtype(int(table.src_dtype[i])), numpy_dtype(int(table.dst_dtype[i]))
        src_at, dst_at = int(table.src_base[i]), int(table.dst_base[i])
        src = view(
            sources[table.src_block[i]], src_at, shape, tuple(table.src_strides[i].tolist()), src_dtype
        )
        block, steps = int(table.dst_block[i]), tuple(table.dst_strides[i].tolist())
        view(blocks[block], dst_at, shape, steps, dst_dtype)[...] = src.get().astype(dst_dtype)
        view(counts[block], dst_at, shape, steps, dst_dtype).count()


def receive(world: World, update: UpdatePlan, index: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Execute one receiver's plan; return its blocks (targets, opaque buffers) and writes per byte."""
    plan = update.receivers[index]
    sizes = [m.num_bytes for m in world.recipe.targets] + [o.nbytes for o in world.opaque]
    blocks = [np.zeros(n, np.uint8) for n in sizes]
    counts = [np.zeros(n, np.uint8) for n in sizes]
    segments = _mapped(world, plan)
    if plan.ring.mode in MAPPED_MODES:
        for b in range(plan.num_buckets):
            run_copies(plan.apply, _rows(plan.apply_starts, b), segments, blocks, counts)
        return blocks, counts
    slots = [np.full(plan.ring.slot_bytes, GUARD, np.uint8) for _ in range(plan.ring.depth)]
    filler = update.broadcast or plan
    segments = _mapped(world, filler)
    for b in range(plan.num_buckets):
        slot = slots[b % plan.ring.depth]
        written = np.zeros_like(slot)
        rows = _rows(filler.fill_starts, b)
        run_copies(filler.fill, rows, segments, [slot], [written])
        owners = {int(filler.segment_holder[s]) for s in filler.fill.src_block[rows].tolist()}
        assert owners == {int(filler.bucket_owner[b])}
        assert int(written.max()) == 1
        assert not written[int(plan.bucket_bytes[b]) :].any()
        run_copies(plan.apply, _rows(plan.apply_starts, b), [slot], blocks, counts)
    return blocks, counts


def _mapped(world: World, plan: TransferPlan | object) -> list[np.ndarray]:
    by_id = {
        d.segment_id: memory
        for manifest, memories in zip(world.manifests, world.segments, strict=True)
        for d, memory in zip(manifest.segments, memories, strict=True)
    }
    for descriptor, holder in zip(plan.segments, plan.segment_holder.tolist(), strict=True):
        assert descriptor in world.manifests[holder].segments
    return [by_id[d.segment_id] for d in plan.segments]


def _rows(starts: np.ndarray, bucket: int) -> slice:
    return slice(int(starts[bucket]), int(starts[bucket + 1]))


def check_received(world: World, blocks: list[np.ndarray], counts: list[np.ndarray]) -> None:
    """Compare every byte with the oracle; each needed byte was written once, the others never."""
    wanted = [*world.expected, *world.opaque]
    for want, got, count, i in zip(wanted, blocks, counts, range(len(wanted)), strict=True):
        region = np.zeros(len(got), np.uint8)
        if i >= len(world.expected):
            region[:] = 1
        for row in np.flatnonzero(world.recipe.regions.block == i).tolist():
            table = world.recipe.regions
            shape = tuple(table.shape[row].tolist())
            if 0 not in shape:
                view(
                    region, int(table.base[row]), shape, tuple(table.strides[row].tolist()), want.dtype
                ).count()
        assert np.array_equal(count, region)
        expected = np.ascontiguousarray(want).reshape(-1).view(np.uint8) if want.size else got
        assert np.array_equal(got[region == 1], expected[region == 1])


def without(manifest: Manifest, rows: np.ndarray) -> Manifest:
    """Return the manifest with only some of its regions."""
    return replace(manifest, regions=manifest.regions.take(rows))
