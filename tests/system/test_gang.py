"""A replica on two of three Ray nodes, with a simulated engine: it lives and dies as a whole."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.drill_cluster_processes import DrillCluster
from loadtests.processes import CannotRun
from placement.plan import Plan
from placement.spec import parse_yaml
from tests.system.harness import eventually, served

pytestmark = pytest.mark.ray

FLEET = """
fleet: gang
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    nodes_per_replica: 2
    max_model_len: 8192
    max_num_seqs: 32
gateway: {{http_port: {http}, grpc_port: {grpc}}}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[DrillCluster, str]]:
    """Three workers of one slot, one replica; and the gateway's URL."""
    with served(FLEET, workers=("a", "b", "c"), slots=1) as cluster:
        yield cluster


def the_replica(cluster: DrillCluster) -> dict[str, Any]:
    """The one that is ready; empty: none is."""
    [variant] = json.loads(cluster.bora("status", "--json"))["variants"]
    ready = [replica for replica in variant["replicas"] if replica["state"] == "ready"]
    return dict(ready[0]) if ready else {}


def another(cluster: DrillCluster, before: dict[str, Any], timeout_s: float = 60) -> dict[str, Any]:
    """The successor of `before`, once it is ready."""

    def successor() -> dict[str, Any]:
        now = the_replica(cluster)
        return now if now and now["replica"] != before["replica"] else {}

    return dict(eventually(successor, timeout_s, 0.5))


def nodes_of(replica: dict[str, Any]) -> set[str]:
    return {replica["node_id"], *(follower["node_id"] for follower in replica["followers"])}


def engines(cluster: DrillCluster) -> list[str]:
    """Ranks that run, as their command lines say."""
    found = []
    for pid in cluster.pids():
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode().split("\0")
        if "cluster.engines.sim_gang" in words and not any("guard.py" in word for word in words):
            found.append(words[words.index("--node-rank") + 1])
    return sorted(found)


def answers(url: str) -> bool:
    body = {"model": "chat", "prompt": "hello", "max_tokens": 4}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return bool(json.load(response)["choices"][0]["text"])


def test_a_replica_has_a_rank_on_each_of_two_nodes_and_serves(cluster: tuple[DrillCluster, str]):
    ray, url = cluster

    assert len(nodes_of(the_replica(ray))) == 2
    assert engines(ray) == ["0", "1"]
    assert answers(url)


def test_its_ranks_are_on_the_nodes_of_the_plan_in_its_order(cluster: tuple[DrillCluster, str]):
    ray, _ = cluster
    replica = the_replica(ray)
    [variant] = json.loads(ray.bora("status", "--json"))["variants"]

    ranks = [replica, *replica["followers"]]
    assert [f"{rank['node']}-{rank['node_id'][:8]}" for rank in ranks] == planned(ray)
    assert variant["misplaced"] == []


def planned(cluster: DrillCluster) -> list[str]:
    """Nodes of the plan's only replica, by rank."""
    file = next(Path(cluster.env["BORA_STATE"]).rglob("plan.yaml"))
    [variant] = parse_yaml(file.read_text(), Plan, source="plan").variants
    [replica] = variant.placement
    return [part.node for part in replica]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_any_rank_starts_the_whole_gang_anew(
    cluster: tuple[DrillCluster, str], rank: int
):
    ray, url = cluster
    before = the_replica(ray)

    os.kill(ray.pid_with(f"--node-rank {rank}"), signal.SIGKILL)

    another(ray, before)
    assert engines(ray) == ["0", "1"]
    assert answers(url)


def test_the_death_of_the_leading_actor_leaves_no_rank_behind(cluster: tuple[DrillCluster, str]):
    ray, url = cluster
    before = the_replica(ray)

    os.kill(ray.pid_of("ServeReplica"), signal.SIGKILL)

    another(ray, before)
    eventually(lambda: engines(ray) == ["0", "1"], 15)
    assert answers(url)


def test_a_gang_on_a_drained_node_moves_as_a_whole(cluster: tuple[DrillCluster, str]):
    """Drained is the follower's node, of which Serve knows nothing."""
    ray, url = cluster
    before = the_replica(ray)
    [follower] = before["followers"]

    ray.bora("drain", follower["node_id"], "--timeout-s", "30")

    after = another(ray, before)
    assert follower["node_id"] not in nodes_of(after)
    assert answers(url)
    events = json.loads(ray.bora("status", "--json"))["events"]
    assert any("not on the nodes of the plan, of which" in event["text"] for event in events)


def test_without_a_second_node_the_replica_waits_and_says_why(cluster: tuple[DrillCluster, str]):
    """After the drain two nodes are left; now one of them dies."""
    ray, _ = cluster
    lost = the_replica(ray)["followers"][0]["node_id"]
    [name] = [name for name in "abc" if _runs(ray, name) and _is(ray, name, lost)]

    ray.kill_node(name)

    def waiting() -> str:
        [variant] = json.loads(ray.bora("status", "--json"))["variants"]
        return str(variant["waiting"])

    expected = "on each of 2 nodes of pool sim, which has 1 such"
    eventually(lambda: expected in waiting(), 60, 0.5)  # once Ray knows that the node is dead
    assert eventually(lambda: engines(ray) == [], 40, 0.5)


def _runs(cluster: DrillCluster, name: str) -> bool:
    return bool(cluster.pids(name))


def _is(cluster: DrillCluster, name: str, node_id: str) -> bool:
    """Whether that worker has that Ray id, which stands in its raylet's command line."""
    try:
        return any(
            node_id.encode() in (Path("/proc") / str(pid) / "cmdline").read_bytes()
            for pid in cluster.pids(name)
        )
    except (OSError, CannotRun):
        return False
