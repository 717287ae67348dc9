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
import os
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from ray.autoscaler._private.command_runner import SSHCommandRunner
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
from cluster.files import write_private
from cluster.provider_config import checked_cluster
from cluster.provider_nodes import Node, adopted, host_of, old_nodes, read_nodes
from cluster.ray_node import head_state_file

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
        self._file = (
            head_state_file(cluster_name)
            if self._on_head
            else made_state_dir() / f"cluster-{cluster_name}.json"
        )
        self._nodes = read_nodes(self._file)
        self._last_start_s: dict[str, float] = {}
        self._last_failure_s: dict[str, float] = {}
        self._leaving: set[str] = set()
        self._torn_down = False
        if self._on_head:
            if not self._nodes:  # of a head that took over without its predecessor's disk
                port = int(provider_config["gcs_port"])
                old = found(self._head, port)
                self._nodes = {node_id: adopted(node_id, kind) for node_id, kind in old.items()}
            self._nodes.setdefault(self._head, Node(self._head, self._head_tags(), answered=True))

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        """Ids of the nodes with these tags."""
        with self._lock:
            return [
                node_id
                for node_id, node in self._nodes.items()
                if all(node.tags.get(key) == value for key, value in tag_filters.items())
            ]

    def nodes_for_teardown(self, tag_filters: Mapping[str, str]) -> list[str]:
        """`ray down`: every host of the file, once; only the head knew which ones ran."""
        if self._on_head or self._torn_down:
            return self.non_terminated_nodes(tag_filters)
        if tag_filters.get(TAG_RAY_NODE_KIND) == NODE_KIND_WORKER:
            return [host for hosts in self._pools.values() for host in hosts]
        return [self._head]

    def is_running(self, node_id: str) -> bool:
        """Whether the host has answered. One that does not is given up by the autoscaler.

        That takes RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S; then it tries another node
        type that serves as well.
        """
        node = self._nodes.get(node_id)
        if node is not None and not node.answered:
            node.answered = self._answers(node.host)
        return node is not None and node.answered

    def is_terminated(self, node_id: str) -> bool:
        """Whether there is no such node any more."""
        return node_id not in self._nodes

    def node_tags(self, node_id: str) -> dict[str, str]:
        """A copy of its tags."""
        with self._lock:
            return dict(self._nodes[node_id].tags)

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
            RuntimeError: the pool has fewer free hosts, which Ray reports.
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
            if len(free) < count:
                raise RuntimeError(f"pool {pool}: {count} hosts wanted, {len(free)} are free")
            with ThreadPoolExecutor(_AT_ONCE) as executor:
                up = dict(zip(free, executor.map(self._answers, free), strict=True))
            order = sorted(free, key=lambda host: (not up[host], self._failed(host)))
            for host in order[:count]:
                self._last_start_s[host] = time.time()
                node_id = f"{host}@{time.time_ns()}"
                self._nodes[node_id] = Node(host, dict(tags), answered=up[host])
                log.info("pool %s: %s %s", pool, node_id, "answers" if up[host] else "is silent")
            self._save()

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
            list(executor.map(self._stop, hosts))

    def get_command_runner(self, log_prefix: str, node_id: str, *args: Any, **kwargs: Any) -> Any:
        """Ray's own over ssh, except that `ray stop` means this cluster only, and drained."""
        auth, name, process_runner, use_internal_ip = args[:4]
        del args, kwargs
        return _Runner(
            log_prefix, node_id, self, auth, name, process_runner, use_internal_ip,
            stop=self._stop_command(),
        )  # fmt: skip

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Check the file and fill in what follows from it: pool sizes, keys of the head's copy."""
        return checked_cluster(cluster_config)

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The head's copy of the file: there the key has another path."""
        provider = cluster_config["provider"]
        provider["on_head"] = True
        provider["ssh"]["key"] = cluster_config["auth"].get("ssh_private_key")
        return cluster_config

    @property
    def _head(self) -> str:
        return str(self.provider_config["head"])

    @property
    def _pools(self) -> Mapping[str, Sequence[str]]:
        pools: Mapping[str, Sequence[str]] = self.provider_config["pools"]
        return pools

    def _head_tags(self) -> dict[str, str]:
        return {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_USER_NODE_TYPE: self.provider_config["head_node_type"],
            TAG_RAY_NODE_NAME: f"ray-{self.cluster_name}-head",
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }

    def _answers(self, host: str) -> bool:
        """Whether something listens on the host's ssh port."""
        with contextlib.suppress(OSError):
            address = (host, self.provider_config["probe_port"])
            socket.create_connection(address, _CONNECT_S).close()
            return True
        return False

    def _failed(self, host: str) -> tuple[float, float]:
        return (self._last_failure_s.get(host, 0.0), self._last_start_s.get(host, 0.0))

    def _stop_command(self) -> str:
        config = self.provider_config
        return (
            f"cd {config['folder']} && {config['python']} -m cluster.ray_node stop "
            f"--cluster {shlex.quote(self.cluster_name)} --drain-s {config['drain_s']}"
        )

    def _stop(self, host: str) -> None:
        ssh = self.provider_config["ssh"]
        command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "LogLevel=ERROR"]
        command += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        command += ["-i", os.path.expanduser(ssh["key"])] if ssh["key"] else []  # noqa: PTH111
        shell = f"bash --login -c {shlex.quote(self._stop_command())}"
        command += [f"{ssh['user']}@{host}", shell]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                timeout=self.provider_config["drain_s"] + 60,
            )  # fmt: skip
            log.info("%s: stopped with status %d: %s", host, done.returncode, done.stderr[-500:])
        except subprocess.TimeoutExpired:
            log.warning("%s: did not stop in time; it may still run processes", host)
        finally:
            with self._lock:
                self._leaving.discard(host)

    def _save(self) -> None:
        write_private(
            self._file, json.dumps({key: asdict(node) for key, node in self._nodes.items()})
        )


class _Runner(SSHCommandRunner):  # type: ignore[misc]
    """ssh, in which `ray stop` (of `ray down`) is replaced."""

    def __init__(self, *args: Any, stop: str) -> None:
        super().__init__(*args)
        self._stop = stop

    def run(self, cmd: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As its base class."""
        return super().run(self._stop if cmd == "ray stop" else cmd, *args, **kwargs)
