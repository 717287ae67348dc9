"""Several Ray nodes on this machine: nodes are drained, and who finds no place says why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.control_api import ControlClient
from cluster.errors import ClusterError
from cluster.messages import LogQuery
from loadtests.drill_cluster_processes import DrillCluster
from loadtests.processes import CannotRun
from tests.system.harness import PATIENCE_S, eventually, served, steady_streams

pytestmark = pytest.mark.ray

FLEET = """
fleet: nodes
models:
  - name: chat
    model: mistral-small-3.2-24b-2506
    engine: sim
    simulate_gpu: H100-SXM
    max_model_len: 8192
    max_num_seqs: 32
    replicas: {{min: 2, max: 6}}
    scaling: {{scale_down_delay_s: 600}}
    engine_args: [--sim-speed=2]
gateway: {{http_port: {http}, grpc_port: {grpc}}}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[DrillCluster, str]]:
    """Two workers of three slots, two replicas; and the gateway's URL."""
    with served(FLEET, workers=("a", "b"), slots=3) as cluster:
        yield cluster


def num_slots(cluster: DrillCluster) -> int:
    """Of the live cluster, as the planner sees it."""
    [fleet] = Path(cluster.env["BORA_STATE"]).parent.glob("fleet.yaml")
    return int(json.loads(cluster.bora("plan", str(fleet), "--json"))["gpus_total"])


async def the_variant(cluster: DrillCluster) -> dict[str, Any]:
    text = await asyncio.to_thread(cluster.bora, "status", "--json")
    [variant] = json.loads(text)["variants"]
    return dict(variant)


async def test_a_log_is_read_on_the_node_that_it_lies_on(cluster: tuple[DrillCluster, str]):
    """As from a host that has no such file: by way of the controller."""
    nodes, _ = cluster
    context = json.loads((Path(nodes.env["BORA_STATE"]) / "context.json").read_text())
    client = ControlClient(context["controller_url"], context["token"])
    replicas = (await the_variant(nodes))["replicas"]
    queries = [LogQuery(node_id=each["node_id"], file=each["log_file"]) for each in replicas]

    parts = [await asyncio.to_thread(client.logs, query) for query in queries]
    on = [await asyncio.to_thread(client.logs, query.model_copy(update={"offset": part.offset}))
          for query, part in zip(queries, parts, strict=True)]  # fmt: skip
    gone = queries[0].model_copy(update={"node_id": "0" * 56})

    assert all(part.lines and not part.problem for part in parts)
    assert [part.offset for part in on] == [part.offset for part in parts]
    assert "is gone" in (await asyncio.to_thread(client.logs, gone)).problem
    with pytest.raises(ClusterError, match="is no log of bora's"):
        await asyncio.to_thread(client.logs, LogQuery(node_id="a", file="/etc/hostname"))


async def test_a_drained_node_is_empty_and_nothing_was_lost_or_missing(
    cluster: tuple[DrillCluster, str],
):
    nodes, url = cluster
    before = (await the_variant(nodes))["replicas"]
    drained = before[0]["node_id"]
    async with steady_streams(url) as load:
        await asyncio.to_thread(nodes.bora, "drain", drained, "--timeout-s", "120")
        await asyncio.sleep(2)

    after = await the_variant(nodes)
    assert after["ready"] == 2
    assert drained not in {replica["node_id"] for replica in after["replicas"]}
    assert load.failures() == []
    assert load.least_ready() >= 2
    await asyncio.to_thread(eventually, lambda: num_slots(nodes) == 3)  # the node has left


async def test_a_replica_without_a_place_says_what_is_missing_where(
    cluster: tuple[DrillCluster, str],
):
    """After the drain one node with three slots is left."""
    nodes, _ = cluster
    await asyncio.to_thread(nodes.bora, "scale", "chat", "5")

    async with asyncio.timeout(PATIENCE_S):
        while "waits for 1 bora_slot" not in (variant := await the_variant(nodes))["waiting"]:
            await asyncio.sleep(0.3)
    assert "0 of 3 free" in variant["waiting"]

    await asyncio.to_thread(nodes.bora, "scale", "chat", "2")
    async with asyncio.timeout(PATIENCE_S):
        while (await the_variant(nodes))["waiting"]:
            await asyncio.sleep(0.3)


async def test_a_name_that_several_nodes_share_is_not_guessed(cluster: tuple[DrillCluster, str]):
    """All nodes here are on one host, of whose controller the drain would take the place too."""
    nodes, _ = cluster
    host = (await the_variant(nodes))["replicas"][0]["node"]

    with pytest.raises(CannotRun, match="could be any of"):
        await asyncio.to_thread(nodes.bora, "drain", host)
