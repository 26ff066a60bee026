"""The tables of one receiver's plan, made from needs and holdings, before processes have names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from headrace.errors import UncoveredRegionError
from headrace.geometry import RegionTable, is_dense
from headrace.plan import CopyTable, DigestTable, Ring
from headrace.planner.copies import finish, make_copies, split_by_bytes
from headrace.planner.digest_tables import (
    digest_table,
    digests_by_holder,
    needed_dtypes,
    needs_of,
    param_ndims,
)
from headrace.planner.holdings import Holdings
from headrace.planner.join import BoxIndex, Pairs, fit_width, holes, join, restrict, uncovered, volumes
from headrace.planner.ring import ALIGN_BYTES, Packing, choose_ring, cut, pack, size, slot_regions
from headrace.recipe import LoadRecipe
from headrace.types import I32, I64, ITEMSIZES, U8, ParamMeta, ParamTable

DIRECT_BUCKETS = 4
_MOST_NAMED = 10
_NUM_SAMPLED = 256


@dataclass(frozen=True)
class Needed:
    """One recipe's needs in the ids of a common parameter table.

    Attributes:
        recipe: Whose needs.
        params: The common parameters.
        ndims: Their real numbers of dims.
        table: Needed boxes, placed in targets and opaque buffers.
        dtype: Dtype code in which each is stored.
        opaque_bytes: Bytes of all opaque buffers.
    """

    recipe: LoadRecipe
    params: ParamTable
    ndims: U8
    table: RegionTable
    dtype: U8
    opaque_bytes: int

    @classmethod
    def of(cls, recipe: LoadRecipe, params: ParamTable, ndims: U8 | None = None) -> Needed:
        """Collect a recipe's needs; names that `params` lacks must have been refused before."""
        table = needs_of(recipe)
        dtype = needed_dtypes(recipe, table)
        opaque_bytes = int(recipe.sources.num_bytes[recipe.opaque].sum())
        if recipe.sources is not params and recipe.sources.key != params.key:
            table = fit_width(
                replace(table, param=recipe.sources.ids_in(params)[table.param]), params.max_ndim
            )
        return cls(
            recipe, params, param_ndims(params) if ndims is None else ndims, table, dtype, opaque_bytes
        )

    @property
    def src_dtype(self) -> U8:
        """Dtype code of each need's source."""
        return self.params.dtype_codes[self.table.param]


@dataclass(frozen=True)
class Served:
    """Every needed byte once: row `i` copies the box of `src` row `i` to `dst` row `i`.

    `holder` is the position of the holder that serves it; `num_holders` holders were asked.
    """

    src: RegionTable
    dst: RegionTable
    src_dtype: U8
    dst_dtype: U8
    holder: I32

    @property
    def num_bytes(self) -> int:
        """Bytes in source dtypes."""
        return int((volumes(self.src.shape) * ITEMSIZES[self.src_dtype]).sum())

    def take(self, rows: I64) -> Served:
        """Return the selected rows in that order."""
        return Served(
            src=self.src.take(rows),
            dst=self.dst.take(rows),
            src_dtype=self.src_dtype[rows],
            dst_dtype=self.dst_dtype[rows],
            holder=self.holder[rows],
        )

    def digests(self, needed: Needed, segment_start: I64) -> dict[int, DigestTable]:
        """Return, per holder position, what it sums up for this receiver."""
        table = digest_table(
            self.src, needed.params, needed.ndims, self.src_dtype, self.dst_dtype, self.dst.block
        )
        return digests_by_holder(table, self.holder, segment_start)


@dataclass(frozen=True)
class Body:
    """The tables of a `TransferPlan`; blocks of `fill` or `apply` sources count the asked holders' segments.

    `bucket_owner` holds positions of holders, -1 where a bucket is read from several. `lent` is the plan's.
    """

    fill: CopyTable
    fill_starts: I64
    apply: CopyTable
    apply_starts: I64
    bucket_owner: I32
    bucket_bytes: I64
    ring: Ring
    segments: I64
    num_bytes: int
    lent: I64 = field(default_factory=lambda: np.zeros((0, 4), np.int64))

    @cached_property
    def key(self) -> str:
        """Digest of the sizes; what lies where follows from recipe and holders, which plans name."""
        digest = hashlib.sha256(f"{self.num_bytes},{len(self.apply)},{len(self.fill)}".encode())
        for column in (self.apply_starts, self.fill_starts, self.bucket_bytes, self.bucket_owner):
            digest.update(column.tobytes())
        return digest.hexdigest()


def serve(needed: Needed, holdings: Holdings) -> Served:
    """Find every needed byte once, replicas balanced.

    Raises:
        UncoveredRegionError: Names what nobody holds.
    """
    needs, boxes = needed.table, holdings.boxes
    pairs = join(needs, boxes)
    missing = uncovered(needs, pairs)
    if len(missing):
        raise uncovered_error(needed, boxes, missing)
    return _served(needed, holdings, pairs)


def _served(needed: Needed, holdings: Holdings, pairs: Pairs) -> Served:
    src_dtype = needed.src_dtype[pairs.need]
    num_bytes = volumes(pairs.shape) * ITEMSIZES[src_dtype]
    weights = np.bincount(pairs.box, num_bytes, len(holdings.boxes)).astype(np.int64)
    rows = holdings.choose(weights)[pairs.box]
    return Served(
        src=restrict(holdings.regions, rows, pairs.offsets, pairs.shape),
        dst=restrict(needed.table, pairs.need, pairs.offsets, pairs.shape),
        src_dtype=src_dtype,
        dst_dtype=needed.dtype[pairs.need],
        holder=holdings.holder[rows],
    )


def may_serve(needed: Needed, boxes: BoxIndex) -> bool:
    """Return whether the boxes hold a sample of the needs: cheap, and False is final."""
    sample = needed.table.take(slice(None, None, max(len(needed.table) // _NUM_SAMPLED, 1)))
    return not len(uncovered(sample, join(sample, boxes)))


def uncovered_error(needed: Needed, boxes: BoxIndex, missing: I64) -> UncoveredRegionError:
    """Return the error that names up to ten boxes that nobody holds."""
    named: list[str] = []
    for row in missing[:_MOST_NAMED].tolist():
        param = int(needed.table.param[row])
        ndim = int(needed.ndims[param])
        for box in holes(needed.table, boxes, row):
            spans = ", ".join(
                f"{o}:{o + n}" for o, n in zip(box.offsets[:ndim], box.shape[:ndim], strict=True)
            )
            named.append(f"{needed.params[param].name}[{spans}]")
    shown = ", ".join(named[:_MOST_NAMED]) + (" and more" if len(named) > _MOST_NAMED else "")
    return UncoveredRegionError(
        f"{len(missing)} boxes that the engine needs are not held wholly by any holder; missing: {shown}. "
        "Publish every rank of the source, or check that all holders joined",
        name=needed.params[int(needed.table.param[missing[0]])].name,
    )


def lent_rows(served: Served, recipe: LoadRecipe) -> I64:
    """Return the rows of opaque sources that the loader can read where they lie: only read, whole, dense, aligned."""
    position = served.dst.block - len(recipe.targets)
    rows = np.flatnonzero(position >= 0)
    position = position[rows]
    whole = np.bincount(position, minlength=len(recipe.opaque))[position] == 1
    item = ITEMSIZES[served.src_dtype[rows]]
    src = served.src.take(rows)
    fits = is_dense(src.strides, src.shape, item) & (src.base % item == 0)
    return np.asarray(rows[whole & fits & np.isin(recipe.opaque, recipe.only_read)[position]])


def direct_body(served: Served, recipe: LoadRecipe, bucket_bytes: int) -> Body:
    """Return copies straight from mapped segments into live tensors, in buckets of `4 * bucket_bytes`."""
    lent = lent_rows(served, recipe)
    copied = served.take(np.setdiff1d(np.arange(len(served.src)), lent))
    copies = make_copies(copied.src, copied.dst, copied.src_dtype, copied.dst_dtype)
    copies, starts, sums = split_by_bytes(copies, DIRECT_BUCKETS * bucket_bytes)
    segments, local = compacted(np.concatenate((copies.src_block, served.src.block[lent])))
    local, lent_segment = local[: len(copies)], local[len(copies) :]
    position = served.dst.block[lent] - len(recipe.targets)
    num_bytes = recipe.sources.num_bytes[recipe.opaque[position]]
    places = (position, lent_segment, served.src.base[lent], num_bytes)
    owners = np.full(len(sums), -1, np.int32)
    ring = Ring("none", 0, 0, "copies go straight into live tensors")
    return Body(
        fill=CopyTable.empty(),
        fill_starts=np.zeros(len(starts), np.int64),
        apply=replace(copies, src_block=local),
        apply_starts=starts,
        bucket_owner=owners,
        bucket_bytes=sums,
        ring=ring,
        segments=segments,
        num_bytes=served.num_bytes,
        lent=np.stack(places, axis=1).astype(np.int64),
    )


@dataclass(frozen=True)
class Packed:
    """Held boxes cut and packed into buckets of at most `slot_bytes`; not yet a ring.

    Attributes:
        src: Pieces as held, sorted by (owner, segment, byte).
        rows: Row of the box that each piece was cut from, shape (N,).
        dtype: Dtype code per piece, shape (N,).
        packing: Where each piece lies in which bucket.
        slot_bytes: Bytes of the fullest bucket, a multiple of 64.
        num_bytes: Bytes of all pieces.
    """

    src: RegionTable
    rows: I64
    dtype: U8
    packing: Packing
    slot_bytes: int
    num_bytes: int

    @classmethod
    def of(cls, src: RegionTable, owner: I32, dtype: U8, limit_bytes: int) -> Packed:
        """Cut and pack boxes; row `i` is filled by `owner[i]`."""
        order = np.lexsort((src.base, src.block, owner))
        src, owner, dtype = src.take(order), owner[order], dtype[order]
        limit = limit_bytes // ALIGN_BYTES * ALIGN_BYTES
        pieces, rows = cut(src, ITEMSIZES[dtype], limit)
        num_bytes = volumes(pieces.shape) * ITEMSIZES[dtype[rows]]
        packing = pack(owner[rows], num_bytes, limit)
        used = -(-int(packing.num_bytes.max(initial=0)) // ALIGN_BYTES) * ALIGN_BYTES
        return cls(pieces, order[rows], dtype[rows], packing, used, int(num_bytes.sum()))

    @property
    def num_buckets(self) -> int:
        """Number of buckets."""
        return len(self.packing.owner)

    def ring(self, budget_bytes: int, reserved_bytes: int) -> Ring:
        """Choose the ring for a budget; where its slots are smaller than `slot_bytes`, pack again for them.

        Raises:
            CapacityError: No slot fits.
        """
        return choose_ring(
            self.num_bytes,
            budget_bytes,
            self.slot_bytes,
            num_buckets=self.num_buckets,
            reserved_bytes=reserved_bytes,
        )

    def settled(self, ring: Ring) -> Ring:
        """Return the ring as this packing uses it: no more slots than buckets."""
        if not self.num_buckets or ring.depth < self.num_buckets:
            return ring
        why = f"all {size(self.num_bytes)} fit into {self.num_buckets} slots of {size(ring.slot_bytes)}"
        return replace(ring, mode="staged", depth=self.num_buckets, why=why)

    def slots(self) -> RegionTable:
        """Return the pieces as they lie in slots, row-major; block 0 is the slot of the bucket."""
        return slot_regions(self.src, self.packing, ITEMSIZES[self.dtype])

    def fill(self) -> tuple[CopyTable, I64]:
        """Return the copies into slots and their bucket bounds."""
        copies = make_copies(self.src, self.slots(), self.dtype, self.dtype)
        return finish(copies, self.packing.bucket, self.num_buckets)


def ring_body(served: Served, packed: Packed, ring: Ring) -> Body:
    """Return copies through a ring: every needed box packed in its holder's order, then applied."""
    fill, fill_starts = packed.fill()
    slots = packed.slots()
    dst = restrict(served.dst, packed.rows, slots.offsets, slots.shape)
    copies = make_copies(slots, dst, packed.dtype, served.dst_dtype[packed.rows])
    apply, apply_starts = finish(copies, packed.packing.bucket, packed.num_buckets)
    segments, local = compacted(fill.src_block)
    return Body(
        fill=replace(fill, src_block=local),
        fill_starts=fill_starts,
        apply=apply,
        apply_starts=apply_starts,
        bucket_owner=packed.packing.owner,
        bucket_bytes=packed.packing.num_bytes,
        ring=ring,
        segments=segments,
        num_bytes=served.num_bytes,
    )


def compacted(blocks: I32) -> tuple[I64, I32]:
    """Return the segments that are used, ascending, and the blocks as positions among them."""
    segments, local = np.unique(blocks, return_inverse=True)
    return segments.astype(np.int64), local.reshape(-1).astype(np.int32)


def union_params(tables: Sequence[ParamTable]) -> ParamTable:
    """Return all parameters of several tables, each name once, in the order in which they are first seen.

    The first table itself where all are equal. Whatever follows, what some of the tables hold keeps its place.
    """
    first = tables[0]
    if all(table is first or table.key == first.key for table in tables):
        return first
    found: dict[str, ParamMeta] = {}
    for table in tables:
        for meta in table:
            found.setdefault(meta.name, meta)
    return ParamTable(found.values())
