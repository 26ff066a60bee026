"""`headrace plan --simulate` without a checkpoint: a cluster's links alone, and cases that others have published."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from headrace.errors import ConfigError
from headrace.planner.fabric import GB, Fabric, Layout, Prediction, predict_all

if TYPE_CHECKING:
    from rich.table import Table

PUBLISHED = "published"
_EXAMPLE = "gb=1030,tp=16,hosts=32,gpus=8,nics=8,nic-gbit=400,pcie-gb=50"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One cluster and one model.

    Attributes:
        gb: Size of the version in 10^9 bytes.
        tp: GPUs that share one copy (tensor, pipeline and expert parallel ranks together).
        hosts: Hosts in all.
        gpus: GPUs of each host.
        nics: NICs of each host.
        nic_gbit: Speed of a NIC in Gbit/s.
        pcie_gb: Speed of a GPU's link in GB/s.
        holders: Hosts that hold the whole version; 0 where every host has read an equal part.
        shards: Shards of a trainer that has them on `holders` hosts; 0 where these hold whole versions.
        name: What it is, for the table.
        published_s: What others have published for it, in seconds; 0 where nobody has.
    """

    gb: float
    tp: int = 8
    hosts: int = 1
    gpus: int = 8
    nics: int = 8
    nic_gbit: float = 400.0
    pcie_gb: float = 50.0
    holders: int = 0
    shards: int = 0
    name: str = "this cluster"
    published_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read `gb=1030,tp=16,hosts=32`; keys are the attributes with `-` for `_`.

        Raises:
            ConfigError: It is not of this form, or makes no sense.
        """
        kinds = {
            f.name.replace("_", "-"): f.type for f in fields(cls) if f.name not in {"name", "published_s"}
        }
        given: dict[str, float | int] = {}
        for part in text.replace(" ", "").split(","):
            key, _, value = part.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            whole = kinds.get(key) == "int"
            if key not in kinds or key in given or number < 0 or (whole and number != int(number)):
                raise ConfigError(f"--simulate cannot use {part!r}; write e.g. {_EXAMPLE}", name="simulate")
            given[key] = int(number) if whole else number
        case = cls(**{key.replace("-", "_"): value for key, value in given.items()})  # type: ignore[arg-type]
        case.check()
        return case

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: Says what.
        """
        if min(self.gb, self.tp, self.hosts, self.gpus, self.nics, self.nic_gbit, self.pcie_gb) <= 0:
            raise ConfigError("a cluster's sizes and speeds must be above 0", name="simulate")
        if self.tp > self.hosts * self.gpus:
            raise ConfigError(f"tp={self.tp} needs more than {self.hosts * self.gpus} GPUs", name="simulate")
        if self.holders and self.holders >= self.hosts:
            raise ConfigError(
                f"holders={self.holders} of {self.hosts} hosts leave nobody to join", name="simulate"
            )

    @property
    def fabric(self) -> Fabric:
        """The links."""
        nic_gb_s = self.nic_gbit / 8
        return Fabric(
            hosts=self.hosts, gpus=self.gpus, nics=self.nics, nic_gb_s=nic_gb_s, pcie_gb_s=self.pcie_gb
        )

    @property
    def layout(self) -> Layout:
        """Who holds what, and who must get it."""
        num_bytes, joiners = int(self.gb * GB), self.hosts - self.holders
        if not self.holders:
            return Layout.divided(num_bytes, self.hosts)
        if not self.shards:
            return Layout.joining(num_bytes, self.holders, joiners)
        replicas = max(1, self.holders // self.shards)
        return Layout.sharded(num_bytes, self.shards, replicas, self.holders, joiners)

    def predict(self) -> list[Prediction]:
        """Return every route's prediction."""
        return predict_all(self.fabric, int(self.gb * GB), self.tp, self.layout)


CASES = (
    Case(name="GLM-4.5-Air BF16, 8 H800", gb=214, tp=8, published_s=3.47),
    Case(name="Qwen3-235B BF16, 8 H800", gb=470, tp=8, published_s=6.22),
    Case(name="DeepSeek-V3.1 FP8, 16 H20", gb=689, tp=16, hosts=2, published_s=10.19),
    Case(name="Kimi-K2 FP8, 16 H20", gb=1030, tp=16, hosts=2, published_s=14.36),
    Case(name="Kimi-K2 FP8, 256 H20", gb=1030, tp=16, hosts=32, published_s=16.04),
    Case(name="Kimi-K2 FP8, 2 hosts join 2", gb=1030, tp=16, hosts=4, holders=2, published_s=17.49),
    Case(name="Kimi-K2 FP8, 4,096 ranks", gb=1030, tp=16, hosts=512),
    Case(name="Kimi-K2 FP8, 448 hosts join 64", gb=1030, tp=16, hosts=512, holders=64),
)
"""Clusters of checkpoint-engine's published figures (update, and p2p join), and larger ones of the same hosts."""


def is_fabric(spec: str) -> bool:
    """Return whether a `--simulate` names a fabric and not a checkpoint's cluster."""
    return spec == PUBLISHED or any(part.strip().startswith("gb=") for part in spec.split(","))


def predictions(spec: str) -> list[tuple[Case, list[Prediction]]]:
    """Return what `--simulate` asks for.

    Raises:
        ConfigError: It is malformed.
    """
    cases = CASES if spec == PUBLISHED else (Case.parse(spec),)
    return [(case, case.predict()) for case in cases]


def fabric_json(found: list[tuple[Case, list[Prediction]]]) -> dict[str, object]:
    """Return predictions as plain data: `cases`, each with `name`, `gb`, `ranks`, `published_s` and `routes`."""
    return {
        "cases": [
            {
                "name": case.name,
                "gb": case.gb,
                "ranks": case.fabric.num_ranks,
                "published_s": case.published_s or None,
                "routes": [
                    {
                        "route": one.route,
                        "seconds": one.seconds,
                        "bound_s": one.bound_s,
                        "share": one.share,
                        "network_bytes": one.network_bytes,
                        "why": one.why,
                    }
                    for one in routes
                ],
            }
            for case, routes in found
        ]
    }


def fabric_table(found: list[tuple[Case, list[Prediction]]]) -> Table:
    """Return predictions as a table: links alone decide, at the speeds that were given."""
    from rich.table import Table

    title = "predicted from link speeds; published: whole updates of checkpoint-engine on such hosts"
    table = Table(
        "cluster", "GB", "route", "seconds", "bound", "share", "limited by", "published", title=title
    )
    for case, routes in found:
        for number, one in enumerate(routes):
            name, size = (case.name, f"{case.gb:g}") if number == 0 else ("", "")
            published = f"{case.published_s:g} s" if case.published_s and number == 0 else ""
            table.add_row(
                name,
                size,
                one.route,
                f"{one.seconds:.3f} s",
                f"{one.bound_s:.3f} s",
                f"{one.share:.1%}",
                one.why,
                published,
            )
    return table
