"""Site: what replicas need to know of the place: where engines listen and where their logs go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ray

from cluster.names import log_folder
from placement.plan import Variant


@dataclass(frozen=True, slots=True)
class Site:
    """The same for all replicas of a fleet, on all nodes."""

    log_dir: str
    engine_host: str | None = None  # None: the node's address

    def host(self) -> str:
        """Address of this node that engines listen on."""
        return self.engine_host or str(ray.util.get_node_ip_address())

    def log(self, variant: Variant, name: str) -> Path:
        """Of the engine of a replica, or of a rank of it, called `name`."""
        return Path(self.log_dir) / log_folder(variant.model) / f"{name}.log"
