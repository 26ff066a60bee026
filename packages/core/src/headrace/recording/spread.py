"""How opacity spreads: through sources to targets, and through targets to everything reloaded with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Opaque:
    """Sources that go through the engine's loader, and targets that it fills, with the reason."""

    sources: set[int]
    reasons: dict[str, str]


def spread(
    feeds: Mapping[str, Iterable[int]],
    reasons: Mapping[str, str],
    sources: Mapping[int, str],
    reload_unit: Callable[[str], str],
) -> Opaque:
    """Return everything that is opaque because something is.

    A reload unit is filled by the loader whole or not at all: one opaque target takes its unit's targets
    along, they take their sources, and a source that the loader gets takes every target it feeds.

    Args:
        feeds: Sources of every target.
        reasons: Targets that are opaque by themselves.
        sources: Sources that are opaque by themselves, and why.
        reload_unit: Unit of a target.
    """
    units: dict[str, list[str]] = defaultdict(list)
    unit_of = {name: reload_unit(name) for name in (*feeds, *(n for n in reasons if n not in feeds))}
    for name, unit in unit_of.items():
        units[unit].append(name)
    fed_by: dict[int, list[str]] = defaultdict(list)
    for name, ids in feeds.items():
        for id_ in ids:
            fed_by[id_].append(name)
    found = Opaque(set(sources), dict(reasons))
    for id_, why in sources.items():
        for name in fed_by[id_]:
            found.reasons.setdefault(name, why)
    todo = list(found.reasons)
    while todo:
        name = todo.pop()
        for id_ in set(feeds.get(name, ())) - found.sources:
            found.sources.add(id_)
            todo += _take(found, fed_by[id_], f"shares a source with {name}")
        todo += _take(found, units.pop(unit_of[name], ()), f"is reloaded with {name}")
    return found


def _take(found: Opaque, names: Iterable[str], why: str) -> list[str]:
    new = [name for name in names if name not in found.reasons]
    found.reasons.update(dict.fromkeys(new, why))
    return new
