"""Which hosts the provider counts as nodes: from its file, or from the GCS that outlived its head."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.files import replace_private
from placement.errors import ConfigError

_ASKED_S = 30.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Node:
    """A host while it belongs to the cluster. Each start has an id of its own."""

    host: str
    tags: dict[str, str] = field(default_factory=dict)
    answered: bool = False


_NODES = TypeAdapter(dict[str, Node])
_HOSTS = TypeAdapter(tuple[str, ...])


class RememberedHosts:
    """Hosts of every `ray up` since they were stopped last, on the operator's machine.

    One that was taken out of the cluster file meanwhile may still run its node.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> tuple[str, ...]:
        """None where the file is missing or broken: those of the cluster file are known anyway."""
        try:
            return _HOSTS.validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return ()
        except ValidationError as error:
            log.warning("%s is broken and counts as lost: %s", self._file, error)
            return ()

    def add(self, hosts: Iterable[str]) -> None:
        """Those that a cluster is about to run on."""
        self._write(dict.fromkeys([*self.read(), *hosts]))

    def forget(self, hosts: Container[str]) -> None:
        """Those on which nothing is left."""
        self._write(host for host in self.read() if host not in hosts)

    def _write(self, hosts: Iterable[str]) -> None:
        replace_private(self._file, json.dumps([*hosts]))


def host_of(node_id: str) -> str:
    """The address in a node's id, which is HOST@START."""
    return node_id.partition("@")[0]


def read_nodes(file: Path) -> dict[str, Node] | None:
    """Nodes by id; None: the file is broken, so that there may be others.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return _NODES.validate_json(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        log.warning("%s is broken and counts as lost: %s", file, error)
        return None
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}; it tells which hosts run: give this account the file"
        ) from error


def outside(nodes: Mapping[str, Node], pools: Mapping[str, Container[str]], head: str) -> list[str]:
    """Ids of nodes whose hosts were taken out of the cluster file, or out of their pool."""
    return [
        node_id
        for node_id, node in nodes.items()
        if node.host != head
        and node.host not in pools.get(node.tags.get(TAG_RAY_USER_NODE_TYPE, ""), ())
    ]


def require_same_head(nodes: Mapping[str, Node], head: str, file: Path) -> None:
    """`nodes`: those of the operator's `file`, which has heads only.

    Raises:
        ConfigError: the cluster was started on another one.
    """
    moved = next((node.host for node in nodes.values() if node.host != head), None)
    if moved is not None:
        raise ConfigError(
            f"provider.head is {head}, but the cluster was started on {moved} ({file}), and two "
            f"heads would fight for its hosts. `ray down` with provider.head: {moved} first; if "
            f"that host is gone for good, delete {file}"
        )


def old_nodes(head: str, port: int) -> dict[str, str]:
    """Node types by id, of live nodes that this head's GCS knows.

    Another head may have started them, if their GCS kept them in Redis.

    Raises:
        ray.exceptions.RpcError: the GCS does not answer.
    """
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
