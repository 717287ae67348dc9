"""Generations: a variant in one shape, as Ray Serve runs it. Values only, no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from cluster.names import NODE_LABEL, POOL_LABEL, SLOT
from cluster.placement_check import NodeFacts
from cluster.shape_version import shape_version
from placement.plan import Plan, Variant

# Serve's names for replicas that it counts as running or as about to be found running again.
RUNNING = ("RUNNING", "UPDATING", "RECOVERING", "PENDING_MIGRATION")


STOPPING = "STOPPING"  # one that waits for a place may be so for minutes, and takes none


class GenerationKey(NamedTuple):
    """Two shapes of a variant run side by side while one replaces the other."""

    variant: str
    version: str


@dataclass(frozen=True, slots=True)
class ServedReplica:
    """A replica as Serve sees it. `state` is Serve's: STARTING, RUNNING, STOPPING, ..."""

    replica: str
    state: str
    node_id: str = ""
    started_s: float = 0.0  # epoch seconds


@dataclass(frozen=True, slots=True)
class Deployed:
    """A generation as Serve was last told it (JSON), and the replica count that it aims at."""

    config: Mapping[str, Any]
    target: int
    replicas: tuple[ServedReplica, ...] = ()
    deleting: bool = False  # its replicas finish what runs, then it is forgotten
    gave_up: bool = False  # its replicas failed so often that Serve starts no more
    parts: Mapping[int, Deployed] = field(default_factory=dict)  # of a gang, by place

    @property
    def model(self) -> str:
        """The fleet's name for it; empty where Serve has not taken it over yet."""
        return str(self.config.get("model", ""))

    @property
    def only_reads(self) -> bool:
        """Whether its replicas read prompts for others and answer nothing."""
        return self.config.get("role") == "prefill"

    @property
    def living(self) -> dict[int, Deployed]:
        """Its parts that Serve is not about to forget."""
        return {place: part for place, part in self.parts.items() if not part.deleting}

    def count(self, *states: str) -> int:
        """Replicas in one of Serve's states."""
        return sum(replica.state in states for replica in self.replicas)


def together(parts: Mapping[int, Deployed]) -> Deployed:
    """All that Serve runs of a generation, which for a gang may be several deployments."""
    if list(parts) == [0]:
        return replace(parts[0], parts=parts)
    living = [each for each in parts.values() if not each.deleting]
    return Deployed(
        config=next((each.config for each in living if each.config), {}),
        target=sum(each.target for each in living),
        replicas=tuple(replica for each in parts.values() for replica in each.replicas),
        deleting=not living,
        gave_up=any(each.gave_up for each in living),
        parts=parts,
    )


def key_of(variant: Variant) -> GenerationKey:
    """Of the shape that `variant` has now."""
    return GenerationKey(variant.variant, shape_version(variant))


@dataclass(frozen=True, slots=True)
class Census:
    """`begun_s` (monotonic): it knows every replica that had reported by then and still lives."""

    begun_s: float
    generations: Mapping[GenerationKey, Deployed]
    placeless: frozenset[str]  # replicas whose placement group waits for resources
    nodes: Mapping[str, NodeFacts]  # by Ray's node id, those that live


def plan_of(served: Mapping[GenerationKey, Deployed]) -> Plan | None:
    """What a cluster serves whose plan was lost with its head's disk; None: nothing.

    Of two shapes of a variant, one of which was replacing the other, the larger one counts.
    """
    found: dict[str, Variant] = {}
    for each in sorted(served.values(), key=lambda each: each.target):
        if each.config:
            variant = Variant.model_validate(each.config)
            found[variant.variant] = variant
    if not found:
        return None
    return Plan.empty().model_copy(
        update={"fleet": "recovered", "status": "feasible", "variants": tuple(found.values())}
    )


def bundle(variant: Variant) -> dict[str, float]:
    """Ray resources of one replica on one node: all its GPUs (or slots) there."""
    resource = SLOT if variant.gpu == "cpu" else "GPU"
    return {resource: float(_devices(variant) // variant.shape.num_nodes)}


def bundles(variant: Variant) -> list[dict[str, float]]:
    """Of a replica on all of its nodes, which are equal; the leader's first."""
    return [bundle(variant)] * variant.shape.num_nodes


def selectors(
    variant: Variant, nodes: Sequence[str] = (), leaves: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Labels of the nodes that the bundles may be on, in Ray's ids.

    Of their pools: these very `nodes`, or any but those that they leave to others.
    """
    pools = [{POOL_LABEL: pool} for pool in variant.rank_pools]
    if nodes:
        return [{**pool, NODE_LABEL: node} for pool, node in zip(pools, nodes, strict=True)]
    others = {NODE_LABEL: f"!in({','.join(leaves)})"} if leaves else {}
    return [{**pool, **others} for pool in pools]


def spread(variant: Variant) -> str:
    """Ray's strategy for the bundles of a replica.

    A tensor parallel group needs one node; the nodes of a gang must not be the same one, unless
    they give unequal numbers of GPUs, where one node has several of the equal bundles.
    """
    if variant.shape.num_nodes == 1:
        return "STRICT_PACK"
    unequal = variant.beside and variant.shape.num_nodes != len(variant.pools)
    return "PACK" if unequal else "STRICT_SPREAD"


def _devices(variant: Variant) -> int:
    if variant.placement:
        return sum(len(node.gpus) for node in variant.placement[0])
    return max(variant.gpus_per_replica, variant.shape.num_nodes)
