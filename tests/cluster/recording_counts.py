"""A deployer that deploys nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import ClusterError
from cluster.gang_nodes import Move, NodeWish
from cluster.generations import GenerationKey, key_of
from placement.plan import Variant


class RecordingCounts:
    """Remembers what Serve would be asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.wished: tuple[NodeWish, ...] = (NodeWish(),)  # of every gang

    async def scale(self, key: GenerationKey, replicas: int) -> None:
        self.calls.append(("scale", key, replicas))

    async def delete(self, key: GenerationKey) -> None:
        self.calls.append(("delete", key))

    async def wishes(self, key: GenerationKey) -> tuple[NodeWish, ...]:
        return self.wished

    async def move(self, variant: Variant, move: Move) -> None:
        self.wished = (NodeWish(),)
        self.calls.append(("move", key_of(variant), move))

    async def again(self, variant: Variant, count: int) -> None:
        self.calls.append(("again", key_of(variant), count))


class RecordingRooms:
    """Remembers which rooms are held."""

    def __init__(self) -> None:
        self.held: dict[str, Mapping[str, float]] = {}
        self.refuses = False

    def hold(self, rooms: Mapping[str, Mapping[str, float]]) -> list[str]:
        if self.refuses:
            raise ClusterError("somebody was faster")
        self.held |= rooms
        return list(rooms)

    def release(self, groups: Sequence[str]) -> None:
        for node in groups:
            del self.held[node]
