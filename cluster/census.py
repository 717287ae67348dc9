"""Census: what Ray and Serve say of our replicas and nodes, looked at once in a while."""

from __future__ import annotations

import time

import ray
from ray.core.generated import autoscaler_pb2

from cluster import serve_apps
from cluster.errors import ClusterError
from cluster.generations import RUNNING, Census
from cluster.names import POOL_LABEL
from cluster.placement_check import NodeFacts
from cluster.ray_inventory import node_name
from placement.errors import ConfigError


def take() -> Census:
    """Ask Serve and Ray's GCS. Blocks for some milliseconds; seconds while one of them restarts.

    Raises:
        ray.exceptions.RayError: Serve's controller does not answer.
    """
    begun_s = time.monotonic()
    generations = serve_apps.deployed()
    # Whoever runs has its place.
    settled = all(each.count(*RUNNING) == len(each.replicas) for each in generations.values())
    return Census(
        begun_s=begun_s,
        generations=generations,
        placeless=frozenset() if settled else serve_apps.waiting(),
        nodes=live_nodes(),
    )


def live_nodes() -> dict[str, NodeFacts]:
    """By Ray's ids. Blocks as `take` does."""
    free = ray._private.state.available_resources_per_node()  # noqa: SLF001 - no public one
    return {
        node["NodeID"]: NodeFacts(
            node_id=node["NodeID"],
            name=node_name(node),
            pool=node["Labels"].get(POOL_LABEL, ""),
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    }


def drain_node(node_id: str, reason: str, timeout_s: float) -> None:
    """Let Ray place nothing there any more. Serve then starts successors of its replicas elsewhere.

    After `timeout_s` Serve stops what is left there, each replica after its running requests. The
    node leaves the cluster once nothing runs on it.

    Raises:
        ConfigError: the controller, which asks for that, is there.
        ClusterError: Ray refuses.
    """
    if node_id == ray.get_runtime_context().get_node_id():
        raise ConfigError(
            f"{live_nodes()[node_id].name} runs bora's controller and cannot be drained while it "
            f"serves; `bora down` stops everything on it"
        )
    # Serve begins to stop a node's replicas so long before the deadline as they may take to stop.
    deadline_s = time.time() + timeout_s + serve_apps.STOP_TIMEOUT_S
    client = ray._private.worker.global_worker.gcs_client  # noqa: SLF001
    accepted, said = client.drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        reason,
        int(deadline_s * 1000),
    )
    if not accepted:
        raise ClusterError(f"Ray does not drain the node {node_id[:8]}: {said}")
