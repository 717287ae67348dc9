"""After a node's death two replicas share the other; once it is back, one goes home, with no loss."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from loadtests.drill_cluster_processes import DrillCluster
from tests.system.harness import eventually, served, steady_streams

pytestmark = pytest.mark.ray

FLEET = """
fleet: moves
carry_node_loss: true
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 8192
    max_num_seqs: 32
    replicas: {{min: 2, max: 2}}
    engine_args: [--sim-speed=2]
gateway: {{http_port: {http}, grpc_port: {grpc}}}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[DrillCluster, str]]:
    """Two workers of three slots, a replica on each; and the gateway's URL."""
    with served(FLEET, workers=("a", "b"), slots=3) as cluster:
        yield cluster


def the_variant(cluster: DrillCluster) -> dict[str, Any]:
    [variant] = json.loads(cluster.bora("status", "--json"))["variants"]
    return dict(variant)


def serving(cluster: DrillCluster) -> list[int]:
    """Ready replicas of each node that has some."""
    ready = [each for each in the_variant(cluster)["replicas"] if each["state"] == "ready"]
    return sorted(Counter(each["node_id"] for each in ready).values())


async def test_a_replica_goes_home_when_its_node_is_back(cluster: tuple[DrillCluster, str]):
    nodes, url = cluster
    assert serving(nodes) == [1, 1]
    nodes.kill_node("b")
    await asyncio.to_thread(eventually, lambda: serving(nodes) == [2])
    assert "is gone" in "".join(the_variant(nodes)["misplaced"])

    async with steady_streams(url) as load:
        nodes.start_worker("b")
        await asyncio.to_thread(eventually, lambda: serving(nodes) == [1, 1])

    assert load.failures() == []
    assert load.least_ready() >= 2
    await asyncio.to_thread(eventually, lambda: not the_variant(nodes)["misplaced"])
    events = json.loads(nodes.bora("events", "--json"))["events"]
    assert any("move: done" in event["text"] for event in events)
