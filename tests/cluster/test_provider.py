"""The on-prem provider without a network: which hosts it takes, keeps and gives up."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UPDATE_FAILED,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.provider import OnPremProvider
from cluster.provider_config import checked_cluster
from placement.errors import ConfigError

WORKER = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER}
CLUSTER: dict[str, Any] = {
    "cluster_name": "test",
    "head_node_type": "head",
    "auth": {"ssh_user": "me", "ssh_private_key": "~/key"},
    "provider": {
        "type": "external",
        "module": "cluster.provider.OnPremProvider",
        "head": "127.0.0.9",
        "pools": {"h100": ["127.0.0.1", "127.0.0.2"], "a100": ["127.0.0.3"]},
    },
    "available_node_types": {"head": {}, "h100": {"max_workers": 2}, "a100": {}},
}


def a_cluster(**provider: Any) -> dict[str, Any]:
    cluster = copy.deepcopy(CLUSTER)
    cluster["provider"].update(provider)
    return cluster


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Stands for sshd on 127.0.0.2; nothing answers elsewhere."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.2", 0))
        sock.listen()
        yield sock


def a_provider(
    state: Path, monkeypatch: pytest.MonkeyPatch, sshd: socket.socket, *, on_head: bool = True
) -> OnPremProvider:
    monkeypatch.setenv("BORA_STATE", str(state))
    cluster = checked_cluster(a_cluster(probe_port=sshd.getsockname()[1], on_head=on_head))
    return OnPremProvider(cluster["provider"], "test")


def start(provider: OnPremProvider, pool: str, count: int = 1) -> list[str]:
    before = set(provider.non_terminated_nodes(WORKER))
    provider.create_node({}, {**WORKER, TAG_RAY_USER_NODE_TYPE: pool}, count)
    return sorted(set(provider.non_terminated_nodes(WORKER)) - before)


def hosts(provider: OnPremProvider, nodes: list[str]) -> list[str]:
    return [provider.internal_ip(node) for node in nodes]


def test_a_host_that_answers_is_taken_before_one_that_does_not(tmp_path, monkeypatch, port):
    provider = a_provider(tmp_path, monkeypatch, port)

    [first] = start(provider, "h100")
    [second] = start(provider, "h100")

    assert hosts(provider, [first, second]) == ["127.0.0.2", "127.0.0.1"]
    assert provider.is_running(first)
    assert not provider.is_running(second)  # Ray gives it up for another pool


def test_a_full_pool_says_so(tmp_path, monkeypatch, port):
    provider = a_provider(tmp_path, monkeypatch, port)
    start(provider, "h100", 2)

    with pytest.raises(RuntimeError, match="pool h100: 1 hosts wanted, 0 are free"):
        start(provider, "h100")


def test_a_host_whose_start_failed_comes_last(tmp_path, monkeypatch):
    with socket.socket() as sshd:
        sshd.bind(("0.0.0.0", 0))  # all hosts answer
        sshd.listen()
        provider = a_provider(tmp_path, monkeypatch, sshd)
        [node] = start(provider, "h100")
        provider.set_node_tags(node, {TAG_RAY_NODE_STATUS: STATUS_UPDATE_FAILED})
        provider._nodes.pop(node)

        [other] = start(provider, "h100")

        assert hosts(provider, [node, other]) == ["127.0.0.1", "127.0.0.2"]


def test_the_head_is_there_and_scaling_cannot_end_it(tmp_path, monkeypatch, port):
    provider = a_provider(tmp_path, monkeypatch, port)
    [head] = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD})

    provider.terminate_nodes([head])

    assert provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD}) == [head]
    assert provider.is_running(head)


def test_a_head_that_took_over_ends_no_host_for_a_node_of_old(tmp_path, monkeypatch, port):
    """Ray's GCS tells it of nodes that died long ago, on hosts that run others now."""
    provider = a_provider(tmp_path, monkeypatch, port)
    [node] = start(provider, "h100")

    provider.terminate_nodes([f"{provider.internal_ip(node)}@1"])

    assert provider.non_terminated_nodes(WORKER) == [node]
    [other] = start(provider, "h100")  # nothing is being stopped there
    assert hosts(provider, [node, other]) == ["127.0.0.2", "127.0.0.1"]


def test_a_head_without_its_disk_adopts_what_runs(tmp_path, monkeypatch, port):
    monkeypatch.setenv("BORA_STATE", str(tmp_path))
    config = checked_cluster(a_cluster(probe_port=port.getsockname()[1], on_head=True))
    asked = []

    def found(head: str, gcs_port: int) -> dict[str, str]:
        asked.append((head, gcs_port))
        return {"127.0.0.2@7": "h100"}

    provider = OnPremProvider(config["provider"], "test", found=found)

    assert asked == [("127.0.0.9", 6379)]
    assert provider.non_terminated_nodes(WORKER) == ["127.0.0.2@7"]
    assert provider.is_running("127.0.0.2@7")
    assert hosts(provider, start(provider, "h100")) == ["127.0.0.1"]


def test_a_restarted_monitor_knows_the_hosts_that_it_started(tmp_path, monkeypatch, port):
    nodes = start(a_provider(tmp_path, monkeypatch, port), "h100", 2)

    again = a_provider(tmp_path, monkeypatch, port)

    assert sorted(again.non_terminated_nodes(WORKER)) == nodes


def test_each_start_of_a_host_is_another_node(tmp_path, monkeypatch, port):
    provider = a_provider(tmp_path, monkeypatch, port)
    [first] = start(provider, "a100")
    provider._nodes.pop(first)

    [second] = start(provider, "a100")

    assert first != second
    assert hosts(provider, [second]) == ["127.0.0.3"]


def test_tags_of_a_node_that_is_gone_are_dropped(tmp_path, monkeypatch, port):
    provider = a_provider(tmp_path, monkeypatch, port)

    provider.set_node_tags("127.0.0.1@1", {"x": "y"})

    assert provider.is_terminated("127.0.0.1@1")


def test_the_operators_side_knows_every_host_for_ray_down(tmp_path, monkeypatch, port):
    provider = a_provider(tmp_path, monkeypatch, port, on_head=False)

    assert provider.nodes_for_teardown({TAG_RAY_NODE_KIND: NODE_KIND_HEAD}) == ["127.0.0.9"]
    assert provider.nodes_for_teardown(WORKER) == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"pools": {"h100": ["a", "b"]}},
            "available_node_types has 'a100', provider.pools has not",
        ),
        ({"pools": {"h100": ["a", "b"], "a100": ["c"], "l4": []}}, "provider.pools has 'l4'"),
        ({"pools": {"h100": ["a"], "a100": ["c"]}}, "max_workers is 2, provider.pools.h100 has 1"),
        ({"pools": {"h100": ["a", "b"], "a100": ["a"]}}, "a is also in provider.pools.h100"),
        ({"head": "127.0.0.3"}, "127.0.0.3 is also in provider.head"),
        ({"drain_s": -1}, "provider.drain_s: .*, got -1"),
        ({"hosts": []}, "provider.hosts: Extra inputs"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        checked_cluster(a_cluster(**changes))


def test_a_file_without_a_key_is_refused():
    cluster = a_cluster()
    del cluster["auth"]["ssh_private_key"]

    with pytest.raises(ConfigError, match="ssh_private_key"):
        checked_cluster(cluster)


def test_the_heads_copy_of_the_file_has_the_heads_key():
    cluster = checked_cluster(a_cluster())
    cluster["auth"]["ssh_private_key"] = "~/ray_bootstrap_key.pem"
    provider = OnPremProvider.__new__(OnPremProvider)

    copied = OnPremProvider.prepare_for_head_node(provider, cluster)

    assert copied["provider"]["on_head"] is True
    assert copied["provider"]["ssh"] == {"user": "me", "key": "~/ray_bootstrap_key.pem"}
