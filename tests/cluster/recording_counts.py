"""A deployer that deploys nothing."""

from __future__ import annotations

from typing import Any

from cluster.generations import GenerationKey


class RecordingCounts:
    """Remembers what Serve would be asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        self.calls.append(("scale", key, replicas))

    async def delete(self, key: GenerationKey) -> None:
        self.calls.append(("delete", key))
