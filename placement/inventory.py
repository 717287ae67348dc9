"""Inventory: the pools of nodes that a plan may use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from placement.errors import UnknownName
from placement.spec import Spec


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
    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt
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
            raise ValueError(f"{len(self.node_names)} node_names for {self.nodes} nodes")
        if self.gpu.lower() == "cpu" and (
            self.memory_gib_per_gpu is None or self.kv_cache_gib_per_gpu is None
        ):
            raise ValueError("a pool of `cpu` needs memory_gib_per_gpu and kv_cache_gib_per_gpu")
        return self

    def names(self) -> tuple[str, ...]:
        """The nodes' names, in order."""
        return self.node_names or tuple(f"{self.name}-{index}" for index in range(self.nodes))


class Inventory(Spec):
    """All pools."""

    pools: tuple[Pool, ...] = Field(min_length=1)
    currency: str = "USD"

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [pool.name for pool in self.pools]
        nodes = [node for pool in self.pools for node in pool.names()]
        for known in (names, nodes):
            for name, times in Counter(known).items():
                if times > 1:
                    raise ValueError(f"two pools or nodes are called {name!r}")
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
