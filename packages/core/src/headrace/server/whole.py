"""A version as a whole: its parameters, and their sums as its holders and as its readers make them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headrace.config import UpdateSettings
from headrace.digests import digest
from headrace.errors import ManifestMismatchError, RemoteProtocolError
from headrace.geometry import Box, RegionTable, contiguous_strides
from headrace.manifest import Manifest
from headrace.plan import DigestTable
from headrace.planner import Planner, ReceiverNeeds
from headrace.planner.bodies import union_params
from headrace.planner.digest_tables import digest_table, param_ndims
from headrace.recipe import FillTable, LoadRecipe
from headrace.types import DTYPES, U64, ParamTable, WorkerId, dtype_code
from headrace.wire import Offer

_NO_LIMIT = 1 << 62


def params_of(manifests: Sequence[Manifest]) -> ParamTable:
    """Return the parameters of a version, in the order that sums of it are given in."""
    return union_params([manifest.params for manifest in manifests])


def whole_regions(params: ParamTable) -> RegionTable:
    """Return every parameter whole, each dense in a block of its own."""
    rows = []
    for index, meta in enumerate(params):
        strides = contiguous_strides(meta.shape, DTYPES[dtype_code(meta.dtype)].itemsize)
        rows.append((index, Box.whole(meta.shape), index, 0, strides))
    return RegionTable.from_rows(rows, params.max_ndim)


def sum_tables(manifests: Sequence[Manifest]) -> dict[int, DigestTable]:
    """Return what each holder sums up so that the sums of all make those of every parameter; group is the parameter.

    Raises:
        UncoveredRegionError: The holders do not have the whole version; names what is missing.
        ManifestMismatchError: They do not hold the same model.
    """
    params = params_of(manifests)
    none = np.zeros(0, np.int32)
    recipe = LoadRecipe(params, params, whole_regions(params), FillTable.empty(), none, none, {}, proven=True)
    reachable = frozenset(range(len(manifests)))
    needs = ReceiverNeeds(
        worker=WorkerId("the version as a whole", 0),
        recipe=recipe,
        reachable=reachable,
        budget_bytes=_NO_LIMIT,
    )
    return Planner().plan(manifests, [needs], UpdateSettings(transport="memory")).digests[0]


def sums_of(params: ParamTable, regions: RegionTable, blocks: Sequence[torch.Tensor]) -> U64:
    """Return the sum of every region in memory here, shape (len(regions),); those of a parameter add up to its own."""
    codes = params.dtype_codes[regions.param]
    rows = np.arange(len(regions), dtype=np.int32)
    table = digest_table(regions, params, param_ndims(params), codes, codes, rows)
    return digest(table, blocks, num_groups=len(regions))


def check_whole(offer: Offer, who: str) -> None:
    """Check that an offer names holders, and has a sum of each of their parameters.

    Raises:
        RemoteProtocolError: It does not.
        ManifestMismatchError: The holders do not hold the same model.
    """
    wanted = (len(params_of(offer.manifests)),) if offer.manifests else ()
    if not offer.manifests or offer.sums.shape != wanted or offer.sums.dtype != np.uint64:
        text = (
            f"{who} offers version {offer.version} of {len(offer.manifests)} holders with sums "
            f"{offer.sums.dtype}{offer.sums.shape}, where uint64{wanted} belong"
        )
        raise RemoteProtocolError(text, name=who, weight_version=offer.version, phase="join")


def check_equal(one: Offer, other: Offer, who: str) -> None:
    """Check that two offers of a version, each whole, are of the same bytes.

    Raises:
        ManifestMismatchError: They differ; names some parameters that do.
    """
    mine, theirs = (
        {m: int(s) for m, s in zip(params_of(o.manifests), o.sums, strict=True)} for o in (one, other)
    )
    differing = sorted(m.name for m in mine.keys() | theirs.keys() if mine.get(m) != theirs.get(m))
    if differing:
        text = (
            f"{who} holds something else under version {one.version} than {other.manifests[0].holder.holder_id}: "
            f"{len(differing)} parameters differ, such as {', '.join(differing[:3])}"
        )
        raise ManifestMismatchError(text, differing, name=who, weight_version=one.version, phase="join")
