"""Held rooms: free resources of nodes that Ray gives to nobody for a moment."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.errors import ClusterError
from cluster.names import NODE_LABEL

TIMEOUT_S = 3.0  # what is free is given out in some ten milliseconds


def hold(rooms: Mapping[str, Mapping[str, float]]) -> Sequence[PlacementGroup]:
    """Take these resources, by Ray's node id. They come free when this process ends, too. Blocks.

    Raises:
        ClusterError: somebody else has taken some of them meanwhile; none is held.
    """
    groups = [
        placement_group(
            [dict(room)], strategy="STRICT_PACK", bundle_label_selector=[{NODE_LABEL: node_id}]
        )
        for node_id, room in rooms.items()
    ]
    deadline = time.monotonic() + TIMEOUT_S
    for group in groups:
        if not group.wait(max(0.0, deadline - time.monotonic())):
            release(groups)
            raise ClusterError("free GPUs were given out while they were to be held")
    return groups


def release(groups: Sequence[PlacementGroup]) -> None:
    """Give them back."""
    for group in groups:
        remove_placement_group(group)
