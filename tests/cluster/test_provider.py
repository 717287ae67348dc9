"""The on-prem provider without a network: which hosts it takes, keeps and gives up."""

from __future__ import annotations

import copy
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
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
from tests.system.harness import eventually

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
    "head_start_ray_commands": [
        "python -m cluster.ray_node start --cluster test -- ray start --head --port=6379"
    ],
    "worker_start_ray_commands": ["python -m cluster.ray_node start --cluster test -- ray start"],
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


def an_ssh(folder: Path, monkeypatch: pytest.MonkeyPatch, *, refused: str = "-") -> Path:
    """An `ssh` on the PATH; returns the file in which it notes what it is asked to run where."""
    folder.mkdir()
    script = folder / "ssh"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\n'
        f'case "$*" in *me@{refused}\\ *) printf "\\377 no route to host" >&2; exit 255;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "asked"


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


def test_of_too_small_a_pool_the_free_hosts_are_taken(tmp_path, monkeypatch, port):
    """One host that is still being stopped must not keep the others of its pool waiting."""
    provider = a_provider(tmp_path, monkeypatch, port)
    provider._leaving.add("127.0.0.1")

    with pytest.raises(RuntimeError, match="pool h100: 2 hosts wanted, 1 are free"):
        start(provider, "h100", 2)

    assert hosts(provider, provider.non_terminated_nodes(WORKER)) == ["127.0.0.2"]


def test_silent_hosts_are_asked_all_at_once(tmp_path, monkeypatch, port):
    """The autoscaler asks for each node apart, and a host that is off takes a second each time."""
    together = threading.Barrier(3, timeout=60)

    class Waiting(OnPremProvider):
        asked = False

        def _answers(self, host: str) -> bool:
            if self.asked:
                together.wait()
            return self.asked

    monkeypatch.setenv("BORA_STATE", str(tmp_path))
    cluster = checked_cluster(a_cluster(probe_port=port.getsockname()[1], on_head=True))
    provider = Waiting(cluster["provider"], "test")
    nodes = [*start(provider, "h100", 2), *start(provider, "a100")]
    provider.asked = True

    assert all(provider.is_running(node) for node in nodes)


def test_a_node_that_another_thread_has_just_given_up_has_no_tags(tmp_path, monkeypatch, port):
    """Ray lists nodes, then asks for the tags of each: an error would lose it the whole round."""
    provider = a_provider(tmp_path, monkeypatch, port)

    assert provider.node_tags("127.0.0.1@1") == {}


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


@pytest.mark.parametrize("file", [None, "", '{"127.0.0.2@7": {"ho', "[]", '{"a": {"host": 1}}'])
def test_a_head_whose_file_is_lost_or_broken_adopts_what_runs(
    tmp_path, monkeypatch, port, file: str | None
):
    monkeypatch.setenv("BORA_STATE", str(tmp_path))
    if file is None:
        monkeypatch.setenv("RAY_REDIS_ADDRESS", "10.0.0.5:6379")
    else:
        (tmp_path / "cluster-test-head.json").write_text(file)
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


def test_a_head_without_redis_or_file_is_new_and_asks_nobody(tmp_path, monkeypatch, port):
    provider = a_provider(tmp_path, monkeypatch, port)

    assert provider.non_terminated_nodes(WORKER) == []


def test_a_full_disk_leaves_the_file_whole(tmp_path, monkeypatch, port):
    """A file that was cut off would be taken for no hosts at all, and all of them started anew."""
    start(a_provider(tmp_path, monkeypatch, port), "h100")
    file = tmp_path / "cluster-test-head.json"
    before, limits = file.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    provider = a_provider(tmp_path, monkeypatch, port)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            start(provider, "a100")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)

    assert file.read_text() == before


def test_a_host_that_was_taken_out_of_the_file_is_stopped(tmp_path, monkeypatch, port):
    asked = an_ssh(tmp_path / "bin", monkeypatch)
    [node] = start(a_provider(tmp_path, monkeypatch, port), "h100")
    file = a_cluster(pools={"h100": ["127.0.0.1"], "a100": ["127.0.0.3"]}, on_head=True)
    file["available_node_types"]["h100"]["max_workers"] = 1

    provider = OnPremProvider(checked_cluster(file)["provider"], "test")

    assert provider.is_terminated(node)
    eventually(lambda: asked.exists() and "ray_node stop --cluster test" in asked.read_text())
    assert "me@127.0.0.2" in asked.read_text()


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


def an_operator(**provider: Any) -> OnPremProvider:
    cluster = checked_cluster(a_cluster(**provider))
    return OnPremProvider(cluster["provider"], "test")


def torn_down(provider: OnPremProvider) -> None:
    nodes = [
        *provider.nodes_for_teardown({TAG_RAY_NODE_KIND: NODE_KIND_HEAD}),
        *provider.nodes_for_teardown(WORKER),
    ]
    provider.terminate_nodes(nodes)


def test_ray_down_reaches_hosts_that_were_taken_out_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("BORA_STATE", str(tmp_path))
    asked = an_ssh(tmp_path / "bin", monkeypatch)
    an_operator().prepare_for_head_node(checked_cluster(a_cluster()))  # `ray up`
    smaller = {"h100": ["127.0.0.1", "127.0.0.4"], "a100": ["127.0.0.3"]}

    torn_down(an_operator(pools=smaller))

    assert "me@127.0.0.2" in asked.read_text()
    again = an_operator(pools=smaller).nodes_for_teardown(WORKER)
    assert again == ["127.0.0.1", "127.0.0.4", "127.0.0.3"]  # nothing is left on that one


def test_ray_down_names_hosts_that_it_could_not_stop(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BORA_STATE", str(tmp_path))
    an_ssh(tmp_path / "bin", monkeypatch, refused="127.0.0.2")
    an_operator().prepare_for_head_node(checked_cluster(a_cluster()))

    torn_down(an_operator())

    [told] = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "127.0.0.2 could not be stopped (status 255: \ufffd no route to host)" in told
    assert "`ray down` again" in told
    smaller = {"h100": ["127.0.0.1", "127.0.0.4"], "a100": ["127.0.0.3"]}
    assert "127.0.0.2" in an_operator(pools=smaller).nodes_for_teardown(WORKER)


def test_hosts_are_stopped_by_way_of_the_operators_proxy_which_the_head_does_not_need(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("BORA_STATE", str(tmp_path))
    asked = an_ssh(tmp_path / "bin", monkeypatch)
    file = a_cluster()
    file["auth"]["ssh_proxy_command"] = "nc -x proxy %h %p"
    checked = checked_cluster(file)

    torn_down(OnPremProvider(checked["provider"], "test"))

    assert all("ProxyCommand=nc -x proxy" in line for line in asked.read_text().splitlines())
    assert an_operator().prepare_for_head_node(checked)["provider"]["ssh"]["proxy_command"] is None


def test_a_head_that_moved_in_the_file_is_refused(tmp_path, monkeypatch):
    """Ray would take the old one for the head, and go on there."""
    monkeypatch.setenv("BORA_STATE", str(tmp_path))
    head = {TAG_RAY_NODE_KIND: NODE_KIND_HEAD}
    an_operator().create_node({}, head, 1)
    assert an_operator().non_terminated_nodes(head) == ["127.0.0.9"]

    with pytest.raises(click.ClickException, match=r"head is 127\.0\.0\.8, .* on 127\.0\.0\.9"):
        an_operator(head="127.0.0.8")


def test_a_file_that_may_not_be_read_is_told_with_a_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("BORA_STATE", str(tmp_path))
    (tmp_path / "cluster-test.json").mkdir()  # as root everything may be read

    with pytest.raises(click.ClickException, match=r"cluster-test\.json: Is a directory; it tells"):
        an_operator()


def test_ray_up_ends_with_what_is_wrong_and_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = a_cluster()
    with pytest.raises(click.ClickException, match="ssh_private_key: there is no file ~/key"):
        OnPremProvider.bootstrap_config(file)
    (tmp_path / "key").touch()
    file["auth"]["ssh_private_key"] = str(tmp_path / "key")
    file["file_mounts"] = {"~/bora/cluster": "cluster"}
    with pytest.raises(click.ClickException, match=f"there is no cluster; .*{tmp_path}"):
        OnPremProvider.bootstrap_config(file)
    file["file_mounts"] = {"~/.ray/auth_token": str(tmp_path / "auth_token")}
    with pytest.raises(click.ClickException, match="`ray get-auth-token --generate` makes it"):
        OnPremProvider.bootstrap_config(file)

    (tmp_path / "auth_token").touch()
    assert OnPremProvider.bootstrap_config(file)["provider"]["drain_s"] == 60


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
        ({"hosts": []}, "provider.hosts: no such key"),
        ({"drains": 1}, "provider.drains: no such key; did you mean 'drain_s'"),
        ({"pools": {"h100": "a"}}, "provider.pools.h100: a list of addresses is expected"),
        ({"head": "me@h"}, "provider.head: 'me@h' is no address; .* the account is auth.ssh_user"),
        ({"head": "h:2222"}, "provider.head: 'h:2222' is no address; .* ~/.ssh/config"),
        ({"head": "fd00::1"}, "cannot write IPv6 addresses for rsync"),
        ({"head": "-oProxyCommand=x"}, "provider.head: .* is no address"),
        ({"pools": {"h100": ["a", "$(b)"], "a100": ["c"]}}, r"provider.pools.h100: '\$\(b\)'"),
        ({"pools": {"h100": ["a", ""], "a100": ["c"]}}, "provider.pools.h100: '' is no address"),
        ({"folder": "~/my bora"}, "provider.folder: '~/my bora' would be taken apart"),
        ({"gcs_port": 6380}, "provider.gcs_port is 6380, head_start_ray_commands has --port=6379"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        checked_cluster(a_cluster(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auth": {"ssh_user": "me"}}, "auth.ssh_private_key is missing"),
        ({"auth": {"ssh_private_key": "k"}}, "auth.ssh_user: None is no account"),
        ({"auth": None}, "auth: a mapping is expected, .*; got None"),
        ({"available_node_types": []}, "available_node_types: a mapping is expected"),
        ({"head_node_type": "hed"}, r"head_node_type: 'hed' is none of available_node_types"),
        ({"head_node_type": ["head"]}, r"head_node_type: \['head'\] is none"),
        ({"cluster_name": "a/b"}, "cluster_name: 'a/b' is no name"),
        ({"cluster_name": "x" * 64}, "cluster_name: .* is no name"),
        ({"cluster_name": "other"}, "--cluster test is not cluster_name, other; write the same"),
        ({"head_start_ray_commands": ["ray start --head"]}, "head_start_ray_commands: .*ray_node"),
        ({"worker_start_ray_commands": ["ray start"]}, "worker_start_ray_commands: .*ray_node"),
        ({"docker": {"image": "i", "container_name": "c"}}, "docker: .*on the hosts themselves"),
    ],
)
def test_a_wrong_key_beside_the_provider_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        checked_cluster({**a_cluster(), **changes})


@pytest.mark.parametrize(
    ("pool", "changes", "said"),
    [
        ("h100", {"min_workers": 3}, "h100.min_workers is 3, max_workers is 2 and .* 2 hosts"),
        ("h100", {"min_workers": 2, "max_workers": 1}, "min_workers is 2, max_workers is 1"),
        ("h100", {"max_workers": -1}, "h100.max_workers: a number of hosts is expected, got -1"),
        ("head", {"max_workers": 1}, "head.max_workers is 1, but that is the head's own type"),
        ("h100", {"labels": "x"}, "available_node_types.h100.labels: a mapping is expected"),
        ("head", {"resources": [1]}, "available_node_types.head.resources: a mapping is expected"),
    ],
)
def test_node_types_that_cannot_be_are_refused(pool: str, changes: dict[str, Any], said: str):
    cluster = a_cluster()
    cluster["available_node_types"][pool].update(changes)

    with pytest.raises(ConfigError, match=said):
        checked_cluster(cluster)


def test_a_pool_without_a_size_has_that_of_its_hosts():
    """Ray fills in the max_workers of the whole file, which no pool of several has hosts for."""
    cluster = a_cluster()
    cluster["max_workers"] = 3
    cluster["available_node_types"]["a100"]["max_workers"] = 3

    types = checked_cluster(cluster)["available_node_types"]

    assert {name: types[name]["max_workers"] for name in ("h100", "a100")} == {"h100": 2, "a100": 1}


def test_the_heads_copy_of_the_file_is_the_same_from_every_machine(tmp_path, monkeypatch):
    """Its digest tells whether a node must be started anew."""
    monkeypatch.setenv("BORA_STATE", str(tmp_path))
    copies = []
    for machine in ("laptop", "desktop"):
        cluster = checked_cluster(a_cluster())
        cluster["auth"]["ssh_private_key"] = "~/ray_bootstrap_key.pem"  # as Ray does
        cluster["provider"]["_config_cache_path"] = f"/tmp/{machine}"  # noqa: S108 - as Ray does
        provider = OnPremProvider(cluster["provider"], "test")
        copies.append(copy.deepcopy(provider.prepare_for_head_node(cluster)))

    assert copies[0] == copies[1]
    assert copies[0]["provider"]["on_head"] is True
    ssh = {"user": "me", "key": "~/ray_bootstrap_key.pem", "proxy_command": None}
    assert copies[0]["provider"]["ssh"] == ssh
