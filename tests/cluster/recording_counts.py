"""A deployer that deploys nothing."""

from __future__ import annotations

from typing import Any

from cluster.generations import GenerationKey, key_of
from placement.plan import Variant


class RecordingCounts:
    """Remembers what Serve would be asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.pinned: tuple[str, ...] = ()  # of every gang

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        self.calls.append(("scale", key, replicas))

    async def delete(self, key: GenerationKey) -> None:
        self.calls.append(("delete", key))

    async def pins(self, variant: Variant) -> tuple[str, ...]:
        return self.pinned if variant.shape.num_nodes > 1 else ()

    async def unpin(self, variant: Variant, replicas: int) -> None:
        self.pinned = ()
        self.calls.append(("unpin", key_of(variant), replicas))
