"""Which hosts the provider counts as nodes: from its file, or from the GCS that outlived its head."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.head_store import is_kept

_ASKED_S = 30.0


@dataclass(slots=True)
class Node:
    """A host while it belongs to the cluster. Each start has an id of its own."""

    host: str
    tags: dict[str, str] = field(default_factory=dict)
    answered: bool = False


def host_of(node_id: str) -> str:
    """The address in a node's id, which is HOST@START."""
    return node_id.partition("@")[0]


def read_nodes(file: Path) -> dict[str, Node]:
    """Nodes by id; none where the file is missing or broken."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {key: Node(**node) for key, node in kept.items()}
    return {}


def old_nodes(head: str, port: int) -> dict[str, str]:
    """Node types by id, of live nodes that another head has started.

    Its GCS kept them in Redis; without that there are none.

    Raises:
        ray.exceptions.RpcError: the GCS does not answer.
    """
    if not is_kept():
        return {}
    from ray._raylet import GcsClient  # type: ignore[attr-defined] # noqa: PLC0415 - seldom
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # noqa: PLC0415

    nodes = GcsClient(address=f"{head}:{port}").get_all_node_info(timeout=_ASKED_S).values()
    return {
        node.instance_id: node.node_type_name
        for node in nodes
        if node.state == GcsNodeInfo.ALIVE and node.instance_id and not node.is_head_node
    }


def adopted(node_id: str, node_type: str) -> Node:
    """One of `old_nodes`, which runs as if this provider had started it."""
    tags = {
        TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
        TAG_RAY_USER_NODE_TYPE: node_type,
        TAG_RAY_NODE_NAME: f"ray-{host_of(node_id)}",
        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
    }
    return Node(host_of(node_id), tags, answered=True)
