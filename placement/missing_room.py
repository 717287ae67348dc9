"""Of the GPUs that a way out needs, those that others do not leave; and `replicas.max`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from placement.option import Option, Part
from placement.options import Options
from placement.packing import Places

Free = Mapping[int, Places]  # what others leave, by group of nodes


@dataclass(frozen=True, slots=True)
class MissingRoom:
    """What must change so that an option has its replicas."""

    max_replicas: int | None  # None: `replicas.max` is enough
    more_gpus: tuple[tuple[Part, int], ...]

    @property
    def in_words(self) -> list[str]:
        """Each change."""
        ways = [] if self.max_replicas is None else [f"replicas.max: {self.max_replicas}"]
        return ways + [
            f"{gpus} more GPUs in pool {part.pool.name}, {part.gpus} to a node"
            for part, gpus in self.more_gpus
        ]

    @property
    def more_nodes(self) -> dict[str, int]:
        """By pool, whole nodes with those GPUs."""
        nodes: Counter[str] = Counter()
        for part, gpus in self.more_gpus:
            places = gpus // part.gpus
            nodes[part.pool.name] += -(-places // (part.pool.gpus_per_node // part.gpus))
        return dict(nodes)


def wanted_replicas(option: Option, options: Options) -> int:
    """For the demand and `replicas.min`, whatever `replicas.max` says."""
    return max(1, options.wish.replicas.min, option.replicas_needed)


def places_for(option: Option, free: Free) -> int:
    """Replicas for which there is room."""
    alike = Counter((part.group, part.gpus) for part in option.parts)
    return min(free[group].room(gpus) // parts for (group, gpus), parts in alike.items())


def missing_gpus(option: Option, replicas: int, free: Free) -> list[tuple[Part, int]]:
    """How many GPUs so many replicas are short of, for each kind of part that they have."""
    alike = Counter((part.group, part.gpus) for part in option.parts)
    kinds = {(part.group, part.gpus): part for part in option.parts}
    short = {kind: replicas * parts - free[kind[0]].room(kind[1]) for kind, parts in alike.items()}
    return [(kinds[kind], count * kind[1]) for kind, count in short.items() if count > 0]


def room_for(option: Option, options: Options, free: Free) -> MissingRoom:
    """What the option lacks: the limit of replicas, and GPUs."""
    replicas = wanted_replicas(option, options)
    limit = options.wish.replicas.max
    return MissingRoom(
        max_replicas=replicas if replicas > limit else None,
        more_gpus=tuple(missing_gpus(option, replicas, free)),
    )
