"""Helix's three clusters, as its artifact has them: nodes, what they carry, and its own placements.

Source: the artifact of Helix (ASPLOS 2025; Thesys-lab/Helix-ASPLOS25), folder artifact_evaluation.
Tokens/s of a node by the layers that it holds are the coefficients of its linear programs
(`ilp_model.lp`): for LLaMA-70B those of the whole cluster, for LLaMA-30B those of each type alone,
because it split that cluster by type. Placements are those found with its authors' licence of
Gurobi, within 10 to 50 minutes. It published none for LLaMA-30B on the 42 nodes, nor rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Rates = tuple[float, ...]  # tokens/s of a node that holds 1, 2, 3 ... layers


class Kind(NamedTuple):
    """Nodes that are alike: their type, and the region that they stand in."""

    gpu: str
    region: int


class Span(NamedTuple):
    """A node, and the layers that it holds: the first, and one beyond the last."""

    kind: Kind
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes for one model, and where Helix put its layers."""

    name: str
    model: str
    layers: int
    nodes: Mapping[Kind, int]
    rates: Mapping[str, Rates]
    between_regions: float | None  # tokens/s from one node to another; None: one region
    published: tuple[Span, ...]
    searched: str = "by type"  # how Helix's placement was found

    def rates_of(self, kind: Kind) -> Rates:
        """By the number of layers held."""
        return self.rates[kind.gpu]


_70B: Mapping[str, Rates] = {
    "A100": (
        23833.87, 11384.25, 7201.41, 5264.62, 4096.65, 3124.14, 2595.68, 2045.64, 1754.38,
        1392.63, 1212.18, 952.11,
    ),
    "L4": (7557.86, 3625.71, 2171.88, 1476.08, 1017.57, 747.79, 531.70),
    "T4": (5709.21, 2434.37, 1347.87, 757.85),
}  # fmt: skip
_70B_OF_42: Mapping[str, Rates] = {
    "A100": (
        31327.49, 15363.28, 9918.07, 7039.20, 5430.02, 4251.28, 3405.79, 2847.02, 2339.85,
        1931.11, 1652.86, 1363.71,
    ),
    "V100": (14014.13, 5890.15, 3342.48, 1982.19),
    "L4": (9111.48, 4239.10, 2563.31, 1812.26, 1285.17, 916.81, 655.73),
    "L4x2": (
        17269.02, 8426.92, 5441.14, 3929.42, 3061.02, 2461.63, 2030.42, 1712.86, 1450.18,
        1290.53, 1107.22, 964.26, 838.51, 727.69,
    ),
    "T4": (6179.85, 2911.52, 1622.37, 927.62),
    "T4x2": (
        12194.22, 5813.74, 3663.69, 2706.10, 2121.35, 1626.96, 1271.80, 1021.91, 783.45,
    ),
    "T4x4": (
        20503.53, 10085.51, 6640.71, 4892.24, 3841.24, 3136.81, 2651.22, 2268.51, 1981.14,
        1738.63, 1548.73, 1388.97, 1281.52, 1180.02, 1071.19, 973.64, 872.89, 781.27,
    ),
}  # fmt: skip
_30B: Mapping[str, Rates] = {
    "A100": (
        24422.68, 11751.67, 7569.13, 5481.22, 4380.95, 3525.20, 3021.84, 2535.88, 2158.99,
        1942.71, 1678.98, 1462.93, 1349.65, 1185.81, 1044.53, 912.99, 802.56, 758.11,
    ),
    "L4": (
        2678.28, 1339.63, 828.49, 572.54, 458.17, 320.68, 275.02, 214.98, 168.10, 252.65, 193.31,
    ),
    "T4": (1804.00, 808.50, 539.02, 356.67, 397.69, 331.37, 230.99),
}  # fmt: skip

# Links between regions of 12.5 MB/s on average (config/3cluster24.ini; there they differ by 20 %).
_BETWEEN_REGIONS_BYTES_PER_S = 12.5e6
_70B_TOKEN_BYTES, _30B_TOKEN_BYTES = 8192 * 2, 6656 * 2

_ONE_SITE = {Kind("A100", 0): 4, Kind("L4", 0): 8, Kind("T4", 0): 12}
_THREE_REGIONS = {
    Kind("A100", 0): 4,
    Kind("L4", 1): 2,
    Kind("T4", 1): 8,
    Kind("L4", 2): 6,
    Kind("T4", 2): 4,
}
# Types of the nodes, in the order of the placements: single_cluster, 3cluster24.ini, cluster42.ini.
_ONE_SITE_TYPES = (
    "L4", "T4", "T4", "L4", "T4", "L4", "A100", "T4", "T4", "A100", "A100", "L4", "T4", "T4", "L4",
    "T4", "T4", "A100", "L4", "T4", "T4", "L4", "T4", "L4",
)  # fmt: skip
_REGION_TYPES = (*("A100",) * 4, *("L4",) * 2, *("T4",) * 8, *("L4",) * 6, *("T4",) * 4)
_REGIONS = (*(0,) * 4, *(1,) * 10, *(2,) * 10)
_42_TYPES = (
    "T4", "L4x2", "L4", "V100", "T4x4", "L4x2", "L4", "V100", "A100", "T4x2", "T4", "T4x2", "V100",
    "T4", "V100", "L4", "T4", "T4x2", "L4", "T4", "L4x2", "A100", "T4x2", "L4", "T4x2", "T4",
    "V100", "T4x4", "L4", "T4", "T4", "T4x4", "L4x2", "T4x4", "T4x2", "A100", "T4", "L4", "V100",
    "L4", "A100", "T4",
)  # fmt: skip

# Of each node: its first layer, and how many it holds. Those of the 24 nodes on one site and of the
# 42 come from `ilp_solution.sol`; with `ilp_sol.ini` two nodes of the former would not meet.
_ONE_SITE_70B = (
    (7, 4), (34, 4), (23, 2), (53, 7), (77, 3), (53, 7), (68, 9), (26, 4), (30, 4), (37, 12),
    (60, 8), (42, 7), (33, 4), (38, 4), (3, 4), (0, 3), (11, 3), (14, 9), (46, 7), (42, 4),
    (25, 1), (53, 7), (49, 4), (26, 7),
)  # fmt: skip
_REGIONS_70B = (
    (59, 11), (70, 10), (48, 11), (37, 11), (19, 7), (26, 6), (15, 4), (26, 4), (32, 1), (5, 1),
    (18, 4), (7, 1), (76, 3), (33, 4), (1, 6), (7, 4), (1, 7), (30, 7), (8, 7), (0, 1), (22, 4),
    (11, 3), (14, 4), (75, 1),
)  # fmt: skip
_42_70B = (
    (27, 4), (19, 10), (45, 3), (56, 3), (29, 12), (9, 10), (66, 3), (13, 3), (19, 8), (60, 3),
    (9, 4), (48, 8), (27, 4), (41, 4), (16, 3), (59, 1), (63, 3), (48, 8), (39, 6), (12, 1),
    (69, 8), (2, 6), (69, 8), (1, 7), (59, 7), (9, 4), (9, 4), (39, 17), (2, 1), (41, 4), (79, 1),
    (63, 14), (39, 6), (63, 17), (69, 8), (49, 11), (77, 2), (0, 2), (45, 4), (8, 1), (31, 8),
    (77, 3),
)  # fmt: skip


def _placed(
    types: Sequence[str], held: Sequence[tuple[int, int]], regions: Sequence[int] | None = None
) -> tuple[Span, ...]:
    where = regions or (0,) * len(types)
    return tuple(
        Span(Kind(gpu, region), first, first + layers)
        for gpu, region, (first, layers) in zip(types, where, held, strict=True)
    )


def _in_a_row(kind: Kind, held: Sequence[int]) -> tuple[Span, ...]:
    ends = [sum(held[: index + 1]) for index in range(len(held))]
    return tuple(Span(kind, end - layers, end) for layers, end in zip(held, ends, strict=True))


_ONE_SITE_30B = (
    *_in_a_row(Kind("A100", 0), (15,) * 4),
    *_in_a_row(Kind("L4", 0), (7, 7, 7, 7, 8, 8, 8, 8)),
    *_in_a_row(Kind("T4", 0), (5,) * 12),
)
# The L4 of region 1 are its nodes 0 and 1, the T4 of region 1 its nodes 0 to 7.
_REGIONS_30B = (
    *_in_a_row(Kind("A100", 0), (15,) * 4),
    *_placed(
        ("L4",) * 8,
        ((32, 7), (8, 8), (24, 8), (39, 7), (0, 8), (16, 8), (53, 7), (46, 7)),
        (1, 1, 2, 2, 2, 2, 2, 2),
    ),
    *_placed(("T4",) * 12, [(55 - 5 * node, 5) for node in range(12)], (*(1,) * 8, *(2,) * 4)),
)

CLUSTERS = (
    Cluster(
        name="24 nodes on one site",
        model="LLaMA-30B",
        layers=60,
        nodes=_ONE_SITE,
        rates=_30B,
        between_regions=None,
        published=_ONE_SITE_30B,
    ),
    Cluster(
        name="24 nodes on one site",
        model="LLaMA-70B",
        layers=80,
        nodes=_ONE_SITE,
        rates=_70B,
        between_regions=None,
        published=_placed(_ONE_SITE_TYPES, _ONE_SITE_70B),
        searched="10 minutes of Gurobi",
    ),
    Cluster(
        name="24 nodes in three regions",
        model="LLaMA-30B",
        layers=60,
        nodes=_THREE_REGIONS,
        rates=_30B,
        between_regions=_BETWEEN_REGIONS_BYTES_PER_S / _30B_TOKEN_BYTES,
        published=_REGIONS_30B,
    ),
    Cluster(
        name="24 nodes in three regions",
        model="LLaMA-70B",
        layers=80,
        nodes=_THREE_REGIONS,
        rates=_70B,
        between_regions=_BETWEEN_REGIONS_BYTES_PER_S / _70B_TOKEN_BYTES,
        published=_placed(_REGION_TYPES, _REGIONS_70B, _REGIONS),
        searched="45 minutes of Gurobi",
    ),
    Cluster(
        name="42 nodes of 7 types",
        model="LLaMA-70B",
        layers=80,
        nodes={Kind(gpu, 0): _42_TYPES.count(gpu) for gpu in sorted(set(_42_TYPES))},
        rates=_70B_OF_42,
        between_regions=None,
        published=_placed(_42_TYPES, _42_70B),
        searched="50 minutes of Gurobi",
    ),
)
