"""Inventory: the pools of nodes that a plan may use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from placement.errors import UnknownName
from placement.spec import Spec, mistake

# Each node has a name, so a slip of the finger must not make 10^12 of them.
_MOST_NODES = 100_000
_MOST_GPUS = 1_024  # of a node


def _by_numbers(name: str) -> tuple[list[str | int], str]:
    """Sorts `a-2` before `a-10`; text and numbers take turns, so that like is compared with like."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


class Links(Spec):
    """How GPUs talk to each other."""

    intra: Literal["nvlink", "pcie", "pcie-no-p2p", "host"] | None = Field(
        default=None, description="Inside a node; None: as the GPU type has it."
    )
    inter_gbps: PositiveFloat | None = Field(
        default=None, description="Between nodes, Gbit/s per node."
    )


class Pool(Spec):
    """Nodes that are alike."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")
    gpu: str = Field(description="GPU type, e.g. H100-SXM, or `cpu`.")
    nodes: PositiveInt = Field(default=1, le=_MOST_NODES)
    gpus_per_node: PositiveInt = Field(le=_MOST_GPUS, description="On a `cpu` pool: slots.")
    memory_gib_per_gpu: PositiveFloat | None = Field(
        default=None, description="Torch-visible; None: the GPU type's. Needed for `cpu`."
    )
    kv_cache_gib_per_gpu: PositiveFloat | None = Field(
        default=None, description="`cpu` only: GiB that a rank sets aside for its KV cache."
    )
    host_memory_gib: PositiveFloat | None = None
    links: Links = Links()
    price_per_gpu_hour: NonNegativeFloat | None = Field(
        default=None, description="None: list price."
    )
    spot: bool = Field(default=False, description="Its nodes may be taken away at any time.")
    labels: Mapping[str, str] = Field(default_factory=dict)
    node_names: tuple[str, ...] | None = Field(
        default=None, description="None: POOL-0, POOL-1, ..."
    )

    @model_validator(mode="after")
    def _one_name_a_node(self) -> Self:
        if self.node_names is not None and len(self.node_names) != self.nodes:
            names = f"{len(self.node_names)} names for {self.nodes} nodes"
            raise mistake(f"{names}; give a name for each, or leave node_names out", "node_names")
        if self.gpu.lower() != "cpu":
            return self
        memory, cache = self.memory_gib_per_gpu, self.kv_cache_gib_per_gpu
        if memory is None or cache is None:
            raise ValueError("a pool of `cpu` needs memory_gib_per_gpu and kv_cache_gib_per_gpu")
        if cache >= memory:
            why = f"{cache:g} GiB leave no room for weights in memory_gib_per_gpu: {memory:g}"
            raise mistake(f"{why}; set less", "kv_cache_gib_per_gpu")
        return self

    def names(self) -> tuple[str, ...]:
        """The nodes' names, numbers within them in order, however they were written down."""
        if self.node_names is None:
            return tuple(f"{self.name}-{index}" for index in range(self.nodes))
        return tuple(sorted(self.node_names, key=_by_numbers))

    def with_more_nodes(self, more: int) -> Pool:
        """The pool after nodes were added."""
        names = self.node_names
        if names is not None:
            names = (*names, *(f"{self.name}-new-{index}" for index in range(more)))
        return self.model_copy(update={"nodes": self.nodes + more, "node_names": names})


class Inventory(Spec):
    """All pools."""

    pools: tuple[Pool, ...] = Field(min_length=1)
    currency: str = "USD"

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        pools: set[str] = set()
        nodes: dict[str, str] = {}
        for index, pool in enumerate(self.pools):
            if pool.name in pools:
                why = f"two pools are called {pool.name!r}; give one of them another name"
                raise mistake(why, "pools", index, "name")
            pools.add(pool.name)
            for at, node in enumerate(pool.node_names or pool.names()):
                if node in nodes:
                    why = f"two nodes are called {node!r}, this one and one of {nodes[node]}"
                    where = ("node_names", at) if pool.node_names else ("name",)
                    raise mistake(f"{why}; give one another name", "pools", index, *where)
                nodes[node] = f"pool {pool.name}"
        return self

    def pool(self, name: str) -> Pool:
        """The pool called `name`.

        Raises:
            UnknownName: with the nearest names.
        """
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise UnknownName("pool", name, [pool.name for pool in self.pools])
