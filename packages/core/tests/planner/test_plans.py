"""Plans against a numpy oracle: every needed byte right, once, in bounds; every route, every ring."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World, check_received, make_world, receive, without

from headrace.config import MIB, UpdateSettings
from headrace.errors import CapacityError, ManifestMismatchError, PlanError, UncoveredRegionError
from headrace.geometry import Box, RegionTable
from headrace.manifest import HolderAddress, Manifest, SegmentDescriptor
from headrace.plan import MAPPED_MODES, CopyTable, UpdatePlan
from headrace.planner import Planner, ReceiverNeeds
from headrace.recipe import FillTable, LoadRecipe
from headrace.testing.shapes import qwen3_06b, tp_recipe, whole_manifest
from headrace.types import ITEMSIZES, ParamMeta, ParamTable, WorkerId

SEEDS = st.integers(0, 2**32 - 1)
RUNS = settings(max_examples=120, deadline=None, derandomize=True)


def needs_of(world: World, reachable: set[int], budget: int = 64 * MIB, name: str = "a") -> ReceiverNeeds:
    return ReceiverNeeds(
        worker=WorkerId(name, 0), recipe=world.recipe, reachable=frozenset(reachable), budget_bytes=budget
    )


def planned(world: World, need: ReceiverNeeds, **choices: object) -> UpdatePlan:
    return Planner().plan(world.manifests, [need], UpdateSettings(**choices))


def check(world: World, update: UpdatePlan) -> None:
    plan = update.receivers[0]
    check_received(world, *receive(world, update))
    assert plan.apply_starts[0] == 0
    assert plan.apply_starts[-1] == len(plan.apply)
    assert (np.diff(plan.apply_starts) >= 0).all()
    assert len(plan.bucket_bytes) == len(plan.bucket_owner) == plan.num_buckets
    copied = plan.apply.num_elements * ITEMSIZES[plan.apply.src_dtype]
    if plan.route == "direct":
        assert int(copied.sum()) == plan.num_bytes
    if plan.ring.mode not in MAPPED_MODES:
        assert int(plan.bucket_bytes.max()) <= plan.ring.slot_bytes


@RUNS
@given(SEEDS, st.booleans())
def test_mapped_memory(seed: int, overlaps: bool) -> None:
    world = make_world(seed, overlaps=overlaps)
    update = planned(world, needs_of(world, {0, 1, 2}))
    assert update.receivers[0].transport == "memory"
    assert update.broadcast is None
    check(world, update)


@RUNS
@given(SEEDS, st.sampled_from([4096, 8192, 10_000, MIB]), st.booleans())
def test_tcp_through_a_ring(seed: int, budget: int, overlaps: bool) -> None:
    world = make_world(seed, overlaps=overlaps, extent=20)
    need = needs_of(world, {1}, budget + sum(o.nbytes for o in world.opaque))
    update = planned(world, need, transport="tcp", bucket_bytes=4096)
    assert update.receivers[0].transport == "tcp"
    check(world, update)


@RUNS
@given(SEEDS, st.sampled_from([4096, 8192, MIB]), st.booleans())
def test_broadcast(seed: int, budget: int, overlaps: bool) -> None:
    world = make_world(seed, overlaps=overlaps, extent=20)
    need = needs_of(world, {0}, budget + sum(o.nbytes for o in world.opaque))
    update = planned(world, need, route="broadcast", bucket_bytes=4096)
    assert update.broadcast is not None
    assert update.receivers[0].ring.slot_bytes == update.broadcast.ring.slot_bytes
    assert update.receivers[0].num_bytes == int(
        (update.broadcast.fill.num_elements * ITEMSIZES[update.broadcast.fill.src_dtype]).sum()
    )
    check(world, update)


@RUNS
@given(SEEDS, st.sampled_from(["direct", "tcp", "broadcast"]))
def test_plans_are_deterministic(seed: int, way: str) -> None:
    world = make_world(seed)
    choices = {"direct": {}, "tcp": {"transport": "tcp"}, "broadcast": {"route": "broadcast"}}[way]
    one, two = (planned(world, needs_of(world, {0, 1, 2}), **choices).receivers[0] for _ in range(2))
    assert one.key == two.key
    for table in ("apply", "fill"):
        for column in fields(CopyTable):
            left, right = (getattr(getattr(plan, table), column.name) for plan in (one, two))
            assert np.array_equal(left, right)


@pytest.mark.parametrize("choices", [{"transport": "tcp"}, {"route": "broadcast"}])
@pytest.mark.parametrize(
    ("budget", "mode", "depth"),
    [
        (MIB, "staged", 8),
        (32768, "staged", 8),
        (32767, "overlapped", 4),
        (8192, "overlapped", 2),
        (5000, "serial", 1),
    ],
)
def test_the_budget_decides_the_ring(choices: dict[str, str], budget: int, mode: str, depth: int) -> None:
    world = simple_world(rows=2048, holders=2)
    update = planned(world, needs_of(world, {0}, budget), bucket_bytes=4096, **choices)
    check(world, update)
    plan = update.receivers[0]
    assert (plan.ring.mode, plan.ring.depth, plan.num_buckets) == (mode, depth, 8)
    assert plan.bucket_owner.tolist() == [0, 1] * 4


def test_smaller_slots_may_hold_everything() -> None:
    world = simple_world(rows=3 * MIB // 16, holders=1)
    update = planned(world, needs_of(world, set(), 3 * MIB), bucket_bytes=2 * MIB)
    check(world, update)
    ring = update.receivers[0].ring
    assert (ring.mode, ring.slot_bytes, ring.depth) == ("staged", MIB, 3)


@RUNS
@given(SEEDS, SEEDS)
def test_a_hole_is_named(seed: int, choice: int) -> None:
    world = make_world(seed)
    rng = np.random.default_rng(choice)
    world.manifests = [without(m, rng.random(len(m.regions)) < 0.7) for m in world.manifests]
    held = _held(world)
    needed = _needed_elements(world)
    whole = all(held[name][mask].all() for name, mask in needed.items())
    if whole:
        check(world, planned(world, needs_of(world, {0, 1, 2})))
        return
    with pytest.raises(UncoveredRegionError, match="are not held") as caught:
        planned(world, needs_of(world, {0, 1, 2}))
    holes = [name for name, mask in needed.items() if not held[name][mask].all()]
    assert any(name in str(caught.value) for name in holes)


def _held(world: World) -> dict[str, np.ndarray]:
    held = {m.name: np.zeros(m.shape, np.bool_) for m in world.recipe.sources}
    for manifest in world.manifests:
        for i, box in enumerate(manifest.regions.boxes()):
            meta = manifest.params[int(manifest.regions.param[i])]
            held[meta.name][tuple(slice(o, o + n) for o, n in _spans(box, len(meta.shape)))] = True
    return held


def _needed_elements(world: World) -> dict[str, np.ndarray]:
    needed = {m.name: np.zeros(m.shape, np.bool_) for m in world.recipe.sources}
    for i, box in enumerate(world.recipe.regions.boxes()):
        meta = world.recipe.sources[int(world.recipe.regions.param[i])]
        needed[meta.name][tuple(slice(o, o + n) for o, n in _spans(box, len(meta.shape)))] = True
    for i in world.recipe.opaque.tolist():
        needed[world.recipe.sources[i].name][...] = True
    return needed


def _spans(box: object, ndim: int) -> list[tuple[int, int]]:
    return list(zip(box.offsets[:ndim], box.shape[:ndim], strict=True))


def test_an_overlap_does_not_hide_a_hole() -> None:
    """Two boxes that overlap by as much as is missing: the sum of volumes would be right."""
    world = simple_world(rows=8, holders=2)
    first, second = world.manifests
    regions = replace(second.regions, offsets=np.array([[2, 0]]), shape=np.array([[4, 4]]))
    world.manifests = [first, replace(second, regions=regions)]
    with pytest.raises(UncoveredRegionError, match=r"w\[6:8, 0:4\]"):
        planned(world, needs_of(world, {0, 1}))


def simple_world(rows: int, holders: int, *, replicas: bool = False, dtype: str = "float32") -> World:
    """One parameter `w` of shape (rows, 4), needed whole, in equal row shards or whole replicas."""

    params = ParamTable([ParamMeta("w", dtype, (rows, 4))])
    value = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    each = rows if replicas else rows // holders
    manifests, segments = [], []
    for h in range(holders):
        begin = 0 if replicas else h * each
        regions = RegionTable.from_rows([(0, Box((begin, 0), (each, 4)), 0, 0, (16, 4))])
        descriptor = SegmentDescriptor(f"h{h}", each * 16)
        address = HolderAddress(f"h{h}", tcp_endpoint="127.0.0.1:1")
        manifests.append(Manifest(address, 1, params, (descriptor,), regions))
        segments.append([value[begin : begin + each].reshape(-1).view(np.uint8).copy()])
    table = RegionTable.from_rows([(0, Box((0, 0), (rows, 4)), 0, 0, (16, 4))])
    none = np.zeros(0, np.int32)
    recipe = LoadRecipe(params, ParamTable(list(params)), table, FillTable.empty(), none, none, {})
    return World({"w": value}, manifests, segments, recipe, [value])


def test_adjacent_copies_become_one() -> None:
    world = simple_world(rows=64, holders=1)
    plan = planned(world, needs_of(world, {0})).receivers[0]
    assert len(plan.apply) == 1
    assert plan.apply.shape.tolist() == [[256]]
    assert plan.num_bytes == 1024


def test_replicas_share_the_work() -> None:
    world = make_world(1)
    params = qwen3_06b()
    holders = [whole_manifest(params, f"h{i}") for i in range(4)]
    need = replace(needs_of(world, {2, 3}), recipe=tp_recipe(params, 1, 0, tied=True))
    near = Planner().plan(holders, [need], UpdateSettings()).receivers[0]
    assert set(near.segment_holder.tolist()) == {2, 3}
    loads = _bytes_by_holder(near.apply, near.segment_holder)
    assert loads[2] + loads[3] == near.num_bytes
    everyone = Planner().plan(holders, [replace(need, reachable=frozenset())], UpdateSettings()).receivers[0]
    assert everyone.transport == "tcp"
    loads = _bytes_by_holder(everyone.fill, everyone.segment_holder)
    assert sorted(loads) == [0, 1, 2, 3]
    assert max(loads.values()) - min(loads.values()) <= 2 * int(params.num_bytes.max())
    assert everyone.bucket_owner[:4].tolist() == [0, 1, 2, 3]


def _bytes_by_holder(copies: CopyTable, holder: np.ndarray) -> dict[int, int]:
    num_bytes = copies.num_elements * ITEMSIZES[copies.src_dtype]
    owner = holder[copies.src_block]
    return {int(h): int(num_bytes[owner == h].sum()) for h in np.unique(owner)}


def test_routes_are_chosen_by_what_can_be_mapped() -> None:
    world = simple_world(rows=8, holders=2)
    assert planned(world, needs_of(world, {0, 1})).receivers[0].transport == "memory"
    assert planned(world, needs_of(world, {0})).receivers[0].route == "broadcast"
    far = planned(world, needs_of(world, set())).receivers[0]
    assert (far.route, far.transport) == ("direct", "tcp")
    mixed = Planner().plan(
        world.manifests, [needs_of(world, {0, 1}), needs_of(world, {1}, name="b")], UpdateSettings()
    )
    assert [plan.route for plan in mixed.receivers] == ["direct", "broadcast"]
    assert all(plan.why for plan in mixed.receivers)


@pytest.mark.parametrize(
    ("choices", "reachable", "message"),
    [
        ({"route": "p2p"}, {0}, "no installed transport offers it"),
        ({"route": "broadcast", "transport": "tcp"}, {0}, "goes over transport collective"),
        ({"route": "direct", "transport": "collective"}, {0}, "cannot use transport collective"),
        ({"transport": "memory"}, {0}, "1 of 2 holders are on its host"),
        ({"route": "broadcast"}, set(), "reach none"),
    ],
)
def test_impossible_wishes_say_what_would_work(
    choices: dict[str, str], reachable: set[int], message: str
) -> None:
    world = simple_world(rows=8, holders=2)
    with pytest.raises(PlanError, match=message):
        planned(world, needs_of(world, reachable), **choices)


def test_tcp_needs_endpoints() -> None:
    world = simple_world(rows=8, holders=2)
    silent = world.manifests[1]
    world.manifests[1] = replace(silent, holder=replace(silent.holder, tcp_endpoint=""))
    with pytest.raises(PlanError, match="no tcp endpoint: h1"):
        planned(world, needs_of(world, {0}), transport="tcp")


def test_a_budget_without_room_says_how_much_is_needed() -> None:
    world = simple_world(rows=1024, holders=2)
    with pytest.raises(CapacityError, match="at least 4 KiB are needed"):
        planned(world, needs_of(world, set(), budget=4000))
    world.recipe = replace(world.recipe, opaque=np.array([0], np.int32))
    with pytest.raises(CapacityError, match="raise budget_bytes to at least 16384"):
        planned(world, needs_of(world, {0, 1}, budget=100))
    with pytest.raises(CapacityError, match="20 KiB are needed"):
        planned(world, needs_of(world, set(), budget=16384 + 4000))


def test_versions_must_agree_and_do_not_change_the_key() -> None:
    world = simple_world(rows=8, holders=2)
    planner, need = Planner(), needs_of(world, {0, 1})
    first = planner.plan(world.manifests, [need], UpdateSettings())
    later = [replace(m, version=2) for m in world.manifests]
    assert planner.plan(later, [need], UpdateSettings()) is first
    moved = [replace(m, segments=(replace(m.segments[0], segment_id="x"),)) for m in world.manifests[:1]]
    assert planner.plan([*moved, world.manifests[1]], [need], UpdateSettings()).receivers[0].key != (
        first.receivers[0].key
    )
    with pytest.raises(PlanError, match=r"different versions \[1, 2\]"):
        planner.plan([world.manifests[0], later[1]], [need], UpdateSettings())


@RUNS
@given(SEEDS, st.sampled_from([{}, {"transport": "tcp"}, {"route": "broadcast"}]))
def test_every_holder_may_count_parameters_its_own_way(seed: int, choices: dict[str, str]) -> None:
    world = make_world(seed)
    rng = np.random.default_rng(seed)
    world.manifests = [shuffled(manifest, rng) for manifest in world.manifests]
    check(world, planned(world, needs_of(world, {0, 1, 2}), **choices))


def shuffled(manifest: Manifest, rng: np.random.Generator) -> Manifest:
    """The same holder with its parameters in another order, one nobody needs, none that it does not hold."""
    held = set(manifest.regions.param.tolist())
    order = rng.permutation([i for i in range(len(manifest.params)) if i in held]).tolist()
    extra = ParamMeta("unneeded", "int8", (2, 2, 2, 2))
    place = {old: new for new, old in enumerate(order)}
    param = np.array([place[i] for i in manifest.regions.param.tolist()], np.int32)
    params = ParamTable([*(manifest.params[i] for i in order), extra])
    return replace(manifest, params=params, regions=replace(manifest.regions, param=param))


def test_holders_that_disagree_are_refused() -> None:
    world = simple_world(rows=8, holders=2)
    other = replace(world.manifests[1], params=ParamTable([ParamMeta("w", "float16", (8, 4))]))
    world.manifests = [world.manifests[0], other]
    with pytest.raises(ManifestMismatchError, match="disagree about 1 parameters: w is float16"):
        planned(world, needs_of(world, {0, 1}))


def test_the_smallest_budget_sets_the_broadcast_ring() -> None:
    world = simple_world(rows=2048, holders=2)
    needs = [needs_of(world, {0}, MIB), needs_of(world, {1}, 9000, name="b")]
    update = Planner().plan(world.manifests, needs, UpdateSettings(route="broadcast", bucket_bytes=4096))
    assert update.broadcast is not None
    assert [plan.ring for plan in update.receivers] == [update.broadcast.ring] * 2
    assert update.broadcast.ring.mode == "overlapped"
    for index in range(2):
        check_received(world, *receive(world, update, index))


def test_regions_outside_of_segments_are_refused() -> None:
    world = simple_world(rows=8, holders=1)
    short = replace(world.manifests[0], segments=(replace(world.manifests[0].segments[0], num_bytes=64),))
    world.manifests = [short]
    with pytest.raises(ManifestMismatchError, match="reach out"):
        planned(world, needs_of(world, {0}))


def test_equal_receivers_share_tables_over_their_own_holders() -> None:
    world = simple_world(rows=8, holders=3, replicas=True)
    needs = [needs_of(world, {i}, name=f"i{i}") for i in range(3)]
    update = Planner().plan(world.manifests, needs, UpdateSettings())
    assert update.receivers[0].apply is update.receivers[2].apply
    assert [plan.segments[0].segment_id for plan in update.receivers] == ["h0", "h1", "h2"]
    assert [list(digests) for digests in update.digests] == [[0], [1], [2]]
    same = Planner().plan(
        world.manifests, [needs[0], replace(needs[0], worker=WorkerId("b", 1))], UpdateSettings()
    )
    assert same.digests[0] is same.digests[1]


def test_copying_transports_prefer_holders_of_the_same_host() -> None:
    world = simple_world(rows=64, holders=3, replicas=True)
    update = planned(world, needs_of(world, {2}), transport="tcp")
    check(world, update)
    assert set(update.receivers[0].bucket_owner.tolist()) == {2}


def test_copies_merge_only_where_both_ends_go_on() -> None:
    """Rows that follow each other in the target, but not at the holder, stay apart; so do dims."""
    world = simple_world(rows=8, holders=1)
    gap = [(0, Box((r, 0), (2, 4)), 0, 48 * (r // 2), (16, 4)) for r in range(0, 8, 2)]
    params, value = world.recipe.sources, world.values["w"]
    memory = np.zeros(200, np.uint8)
    for row, (_, _, _, base, _) in enumerate(gap):
        memory[base : base + 32] = value[2 * row : 2 * row + 2].reshape(-1).view(np.uint8)
    descriptor = SegmentDescriptor("gap", len(memory))
    world.manifests = [Manifest(HolderAddress("h0"), 1, params, (descriptor,), RegionTable.from_rows(gap))]
    world.segments = [[memory]]
    update = planned(world, needs_of(world, {0}))
    check(world, update)
    assert update.receivers[0].apply.shape.tolist() == [[8]] * 4
