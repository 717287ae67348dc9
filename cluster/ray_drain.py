"""`python -m cluster.ray_drain GCS NODE SECONDS`: let streams finish before hosts go.

NODE is the id of the node that goes, or `bora`: all of bora, before the whole cluster goes.
"""

from __future__ import annotations

import sys
import time

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated import autoscaler_pb2

from cluster import bootstrap


def main() -> int:
    """0, or 1 when the cluster refuses."""
    gcs, node, seconds = sys.argv[1:]
    if node == "bora":
        bootstrap.connect(gcs)
        bootstrap.stop()
        return 0
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + float(seconds)) * 1000)
    accepted, why = GcsClient(address=gcs).drain_node(
        node, reason, "bora stops this host", deadline_ms
    )
    print("draining" if accepted else f"not drained: {why}", flush=True)  # noqa: T201
    return 0 if accepted else 1


if __name__ == "__main__":
    sys.exit(main())
