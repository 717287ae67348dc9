"""Hosts of our own in pools, for Ray's cluster launcher and autoscaler (v2).

    provider:
      type: external
      module: cluster.provider.OnPremProvider
      head: 10.0.0.10
      pools: {h100: [10.0.0.21, 10.0.0.22], rtx4090: [10.0.0.31]}

A pool is a node type of the same name. Beside Ray's `local` provider, which has one node type and
loses a worker under autoscaler v2: the head is no worker, resources and labels reach each host by
its type, a host that is down is passed over, and `ray down` ends every process of the cluster.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import click
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    STATUS_UPDATE_FAILED,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.context import made_state_dir
from cluster.files import replace_private
from cluster.head_store import is_kept
from cluster.host_stop import StoppingRunner, stop_command, stop_host
from cluster.provider_config import checked_cluster, require_files
from cluster.provider_nodes import (
    Node,
    RememberedHosts,
    adopted,
    host_of,
    old_nodes,
    outside,
    read_nodes,
    require_same_head,
)
from cluster.ray_node import head_state_file
from placement.errors import ConfigError

_CONNECT_S = 1.0
_AT_ONCE = 32

log = logging.getLogger(__name__)


class OnPremProvider(NodeProvider):  # type: ignore[misc]
    """One per process: on the operator's machine during `ray up` and `ray down`, and on the head.

    The first knows the head; the second, which scales, knows itself and the hosts it has started.
    """

    def __init__(
        self,
        provider_config: dict[str, Any],
        cluster_name: str,
        *,
        found: Callable[[str, int], Mapping[str, str]] = old_nodes,
    ) -> None:
        super().__init__(provider_config, cluster_name)
        self._lock = threading.RLock()
        self._on_head = bool(provider_config.get("on_head"))
        self._ask_again_s = 0.0
        self._last_start_s: dict[str, float] = {}
        self._last_failure_s: dict[str, float] = {}
        self._leaving: set[str] = set()
        self._torn_down = False
        with _told():
            folder = made_state_dir()
            self._hosts = RememberedHosts(folder / f"cluster-{cluster_name}-hosts.json")
            self._file = (
                head_state_file(cluster_name)
                if self._on_head
                else folder / f"cluster-{cluster_name}.json"
            )
            kept = read_nodes(self._file)
            self._nodes = kept or {}
            if not self._on_head:
                require_same_head(self._nodes, self._head, self._file)
        if self._on_head:
            self._know_old_nodes(kept, found)

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        """Ids of the nodes with these tags."""
        with self._lock:
            return [
                node_id
                for node_id, node in self._nodes.items()
                if all(node.tags.get(key) == value for key, value in tag_filters.items())
            ]

    def nodes_for_teardown(self, tag_filters: Mapping[str, str]) -> list[str]:
        """`ray down`: every host of the file, once; only the head knew which ones ran.

        Those that the file had at an earlier `ray up` are among them.
        """
        if self._on_head or self._torn_down:
            return self.non_terminated_nodes(tag_filters)
        if tag_filters.get(TAG_RAY_NODE_KIND) == NODE_KIND_WORKER:
            return list(dict.fromkeys([*self._pooled(), *self._hosts.read()]))
        return [self._head]

    def is_running(self, node_id: str) -> bool:
        """Whether the host has answered. One that does not is given up by the autoscaler.

        That takes RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S; then it tries another node
        type that serves as well.
        """
        node = self._nodes.get(node_id)
        if node is not None and not node.answered:
            self._ask_silent()
        return node is not None and node.answered

    def is_terminated(self, node_id: str) -> bool:
        """Whether there is no such node any more."""
        return node_id not in self._nodes

    def node_tags(self, node_id: str) -> dict[str, str]:
        """A copy of its tags; none of a node that has just been given up by another thread."""
        with self._lock:
            return dict(self._nodes[node_id].tags) if node_id in self._nodes else {}

    def set_node_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        """Add or change tags; an updater may end after its node was given up."""
        with self._lock:
            node = self._nodes.get(node_id)
            if node is not None:
                node.tags.update(tags)
                if tags.get(TAG_RAY_NODE_STATUS) == STATUS_UPDATE_FAILED:
                    self._last_failure_s[node.host] = time.time()
                self._save()

    def internal_ip(self, node_id: str) -> str:
        """The host's address."""
        return self._nodes[node_id].host if node_id in self._nodes else host_of(node_id)

    def external_ip(self, node_id: str) -> str:
        """The same: there is one network."""
        return self.internal_ip(node_id)

    def create_node(
        self, node_config: Mapping[str, Any], tags: Mapping[str, str], count: int
    ) -> None:
        """Take `count` free hosts of the pool that is the node type.

        Those that answer come first, of these the ones that did not fail lately. Too few that
        answer: the others are taken too, so that the autoscaler sees them fail.

        Raises:
            RuntimeError: the pool has fewer free hosts, all of which were taken; Ray reports it.
        """
        del node_config
        if tags[TAG_RAY_NODE_KIND] == NODE_KIND_HEAD:
            with self._lock:
                self._nodes[self._head] = Node(self._head, dict(tags))
                self._save()
            return
        pool = tags[TAG_RAY_USER_NODE_TYPE]
        with self._lock:
            busy = {node.host for node in self._nodes.values()} | self._leaving
            free = [host for host in self._pools[pool] if host not in busy]
            with ThreadPoolExecutor(_AT_ONCE) as executor:
                up = dict(zip(free, executor.map(self._answers, free), strict=True))
            order = sorted(free, key=lambda host: (not up[host], self._failed(host)))
            for host in order[:count]:
                self._last_start_s[host] = time.time()
                node_id = f"{host}@{time.time_ns()}"
                self._nodes[node_id] = Node(host, dict(tags), answered=up[host])
                log.info("pool %s: %s %s", pool, node_id, "answers" if up[host] else "is silent")
            self._save()
            if len(free) < count:
                raise RuntimeError(f"pool {pool}: {count} hosts wanted, {len(free)} are free")

    def terminate_node(self, node_id: str) -> None:
        """As `terminate_nodes`."""
        self.terminate_nodes([node_id])

    def terminate_nodes(self, node_ids: Sequence[str]) -> None:
        """Stop the cluster's processes on these hosts, all at once.

        On the head this goes on in the background, since the autoscaler waits for the call; until
        it is done the hosts are not taken again. The head itself is none of the autoscaler's, and
        one that was started anew also ends nodes of old, whose hosts run others by now.
        """
        with self._lock:
            if self._on_head:
                node_ids = [each for each in node_ids if each in self._nodes and each != self._head]
            hosts = [host_of(node_id) for node_id in node_ids]
            for node_id in node_ids:
                self._nodes.pop(node_id, None)
            self._save()
            self._leaving.update(hosts)
            self._torn_down = self._torn_down or not self._on_head
        if self._on_head:
            for host in hosts:
                threading.Thread(target=self._stop, args=(host,), daemon=True).start()
            return
        with ThreadPoolExecutor(_AT_ONCE) as executor:
            stopped = list(executor.map(self._stop, hosts))
        left = [host for host, done in zip(hosts, stopped, strict=True) if not done]
        self._hosts.forget(set(hosts) - set(left))

    def get_command_runner(self, log_prefix: str, node_id: str, *args: Any, **kwargs: Any) -> Any:
        """Ray's own over ssh, except that `ray stop` means this cluster only, and drained."""
        auth, name, process_runner, use_internal_ip = args[:4]
        del args, kwargs
        return StoppingRunner(
            log_prefix, node_id, self, auth, name, process_runner, use_internal_ip,
            stop=stop_command(self.provider_config, self.cluster_name),
        )  # fmt: skip

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Check the file and fill in what follows from it: pool sizes, keys of the head's copy.

        Raises:
            click.ClickException: something is wrong with it; Ray's commands end with the message.
        """
        with _told():
            checked = checked_cluster(cluster_config)
            require_files(checked)
        return checked

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The head's copy of the file: there the key has another path, and no proxy is needed.

        It is the same from whichever machine, or a node would be started anew for nothing.
        """
        self._hosts.add(self._pooled())
        provider = cluster_config["provider"]
        provider.pop("_config_cache_path", None)  # Ray's; it depends on paths of this machine
        provider["on_head"] = True
        key = cluster_config["auth"].get("ssh_private_key")
        provider["ssh"] = {**provider["ssh"], "key": key, "proxy_command": None}
        return cluster_config

    @property
    def _head(self) -> str:
        return str(self.provider_config["head"])

    @property
    def _pools(self) -> Mapping[str, Sequence[str]]:
        pools: Mapping[str, Sequence[str]] = self.provider_config["pools"]
        return pools

    def _pooled(self) -> list[str]:
        return [host for hosts in self._pools.values() for host in hosts]

    def _know_old_nodes(
        self, kept: dict[str, Node] | None, found: Callable[[str, int], Mapping[str, str]]
    ) -> None:
        if kept is None or (not kept and is_kept()):  # a head without its predecessor's disk
            old = found(self._head, int(self.provider_config["gcs_port"]))
            self._nodes = {node_id: adopted(node_id, kind) for node_id, kind in old.items()}
        if taken_out := outside(self._nodes, self._pools, self._head):
            log.warning("no pool has them any more, they are stopped: %s", ", ".join(taken_out))
            self.terminate_nodes(taken_out)
        self._nodes.setdefault(self._head, Node(self._head, self._head_tags(), answered=True))

    def _head_tags(self) -> dict[str, str]:
        return {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_USER_NODE_TYPE: self.provider_config["head_node_type"],
            TAG_RAY_NODE_NAME: f"ray-{self.cluster_name}-head",
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }

    def _ask_silent(self) -> None:
        """All silent hosts at once and once a second: the autoscaler asks for each node apart."""
        with self._lock:
            if time.monotonic() < self._ask_again_s:
                return
            silent = [node for node in self._nodes.values() if not node.answered]
            with ThreadPoolExecutor(_AT_ONCE) as executor:
                found = executor.map(self._answers, [node.host for node in silent])
                for node, answers in zip(silent, found, strict=True):
                    node.answered = answers
            self._ask_again_s = time.monotonic() + _CONNECT_S

    def _answers(self, host: str) -> bool:
        """Whether something listens on the host's ssh port."""
        with contextlib.suppress(OSError):
            address = (host, self.provider_config["probe_port"])
            socket.create_connection(address, _CONNECT_S).close()
            return True
        return False

    def _failed(self, host: str) -> tuple[float, float]:
        return (self._last_failure_s.get(host, 0.0), self._last_start_s.get(host, 0.0))

    def _stop(self, host: str) -> bool:
        """Whether it has answered that no process of the cluster is left there."""
        try:
            return stop_host(host, self.provider_config, self.cluster_name)
        finally:
            with self._lock:
                self._leaving.discard(host)

    def _save(self) -> None:
        replace_private(
            self._file, json.dumps({key: asdict(node) for key, node in self._nodes.items()})
        )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Ray's commands end with what is wrong, not with a traceback."""
    try:
        yield
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
