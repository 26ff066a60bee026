"""A cluster that does not exist, for `headrace plan --simulate`: recipes as in vLLM, holders without memory."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from headrace.config import GIB, UpdateSettings
from headrace.errors import ConfigError
from headrace.manifest import HolderAddress, Manifest, SegmentDescriptor
from headrace.planner import Planner, ReceiverNeeds
from headrace.registry import check_transport
from headrace.server.plan_report import PlanReport, plan_report
from headrace.store.checkpoint import CheckpointSource
from headrace.store.layout import Layout
from headrace.testing.shapes import tp_recipe
from headrace.types import ParamTable, WorkerId

if TYPE_CHECKING:
    from headrace.recipe import LoadRecipe

DEFAULT_BUDGET_BYTES = 16 * GIB
_SPEC = re.compile(r"(\w+)=(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What is simulated.

    Attributes:
        tp: Tensor-parallel workers of each instance; all on one host.
        instances: Engine instances, spread evenly over the hosts.
        hosts: Hosts.
        holders: Holders that share the checkpoint between them, spread evenly over the hosts.
    """

    tp: int
    instances: int = 1
    hosts: int = 1
    holders: int = 1

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Read `tp=8,instances=4,hosts=2,holders=8`.

        Raises:
            ConfigError: It is not of this form.
        """
        known = [field.name for field in fields(cls)]
        given: dict[str, int] = {}
        for part in text.replace(" ", "").split(","):
            match = _SPEC.fullmatch(part)
            if match is None or match[1] not in known or match[1] in given or int(match[2]) < 1:
                example = "tp=8,instances=4,hosts=2,holders=8"
                raise ConfigError(f"--simulate cannot use {part!r}; write e.g. {example}", name="simulate")
            given[match[1]] = int(match[2])
        if "tp" not in given:
            raise ConfigError("--simulate needs tp=N, the workers of one instance", name="simulate")
        return cls(**given)

    def host_of_instance(self, instance: int) -> int:
        """Return where an instance runs."""
        return instance * self.hosts // self.instances

    def host_of_holder(self, holder: int) -> int:
        """Return where a holder runs."""
        return holder * self.hosts // self.holders


def simulate(checkpoint: Path, cluster: Cluster, settings: UpdateSettings) -> PlanReport:
    """Plan an update of a simulated cluster from a real checkpoint's headers; weights are not read.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConfigError: The model cannot be split by `tp`, or nobody knows the transport.
        PlanError: No plan exists, as for a real cluster.
    """
    check_transport(settings.transport)
    manifests = [_manifest(checkpoint, cluster.holders, part) for part in range(cluster.holders)]
    recipes = _recipes(checkpoint, manifests[0].params, cluster.tp)
    budget = DEFAULT_BUDGET_BYTES if settings.budget_bytes is None else settings.budget_bytes
    needs = []
    for instance in range(cluster.instances):
        host = cluster.host_of_instance(instance)
        near = frozenset(h for h in range(cluster.holders) if cluster.host_of_holder(h) == host)
        needs += [
            ReceiverNeeds(
                worker=WorkerId(f"instance-{instance}", rank),
                recipe=recipe,
                reachable=near,
                budget_bytes=budget,
            )
            for rank, recipe in enumerate(recipes)
        ]
    begin = time.monotonic()
    plan = Planner().plan(manifests, needs, settings)
    seconds = time.monotonic() - begin
    pairs = [(need.worker, need.recipe) for need in needs]
    return plan_report(manifests, pairs, plan, version=1, plan_s=seconds)


def _manifest(checkpoint: Path, parts: int, part: int) -> Manifest:
    """Return what a holder of one part of the checkpoint would publish."""
    source = CheckpointSource(checkpoint, parts=parts, part=part)
    try:
        layout = Layout.of(source.metadata(), source.regions())
    finally:
        source.close()
    name = f"holder-{part}"
    segments = tuple(SegmentDescriptor(f"{name}/{i}", size) for i, size in enumerate(layout.segment_bytes))
    address = HolderAddress(name, unix_socket=f"{name}.sock", tcp_endpoint=f"{name}:7001")
    return Manifest(address, 1, layout.params, segments, layout.region_table())


def _recipes(checkpoint: Path, params: ParamTable, tp: int) -> list[LoadRecipe]:
    config = _config(checkpoint)
    kv_heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    tied = bool(config.get("tie_word_embeddings")) and params.index_of("lm_head.weight") is not None
    odd = [meta.name for meta in params if meta.name.count(".") < 1 or not meta.shape]
    if odd:
        text = f"{odd[0]} is no parameter of a decoder; --simulate knows names like model.layers.0.mlp.up_proj.weight"
        raise ConfigError(text, name=odd[0])
    recipes = [
        tp_recipe(params, tp, rank, kv_heads=kv_heads if isinstance(kv_heads, int) else 0, tied=tied)
        for rank in range(tp)
    ]
    _check_divides(params, recipes, tp)
    return recipes


def _check_divides(params: ParamTable, recipes: list[LoadRecipe], tp: int) -> None:
    """Refuse a split that would leave a rest of a parameter to nobody."""
    given = np.zeros(len(params), np.int64)
    for recipe in recipes:
        given += np.bincount(recipe.regions.param, recipe.regions.num_elements, minlength=len(params)).astype(
            np.int64
        )
    given[recipes[0].unused] = params.shapes[recipes[0].unused].prod(axis=1)
    short = np.flatnonzero(given < params.shapes.prod(axis=1))
    if len(short):
        meta = params[int(short[0])]
        text = f"tp={tp} does not divide {meta.name} of shape {meta.shape} (and {len(short) - 1} more)"
        raise ConfigError(text, name=meta.name)


def _config(checkpoint: Path) -> Mapping[str, object]:
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
